// One unit of shared attention: `chunk` queries of one (row, head) over all segments that the row sees.
// Included inside an unnamed namespace, after tile_kernel.h.

struct SharedScratch {
    float *queries, *sums, *top, *total;  // per group of L queries: [d / values, L], [d, L], [L], [L]
    float *keys, *values, *logits, *spare, *shift;
    std::size_t bytes;
};

inline SharedScratch shared_parts(const SharedAttention& a, char* base) {
    Scratch scratch{base};
    SharedScratch parts;
    parts.queries = scratch.floats(a.chunk * a.d);
    parts.sums = scratch.floats(a.chunk * a.d);
    parts.top = scratch.floats(a.chunk);
    parts.total = scratch.floats(a.chunk);
    parts.keys = scratch.floats(kTile * a.d);
    parts.values = scratch.floats(kTile * a.d);
    parts.logits = scratch.floats(kTile * L);
    parts.spare = scratch.floats(L * a.d);
    parts.shift = scratch.floats(kTile);
    parts.bytes = scratch.used;
    return parts;
}

inline std::size_t shared_scratch(const SharedAttention& a) { return shared_parts(a, nullptr).bytes; }

struct SharedSegment {
    Rows keys, values;
    std::int64_t tokens;
    float factor, shift;  // in powers of 2
    const float* bias;    // null without
};

template <class Compute>
void attend_segment(const SharedSegment& segment, const SharedScratch& parts, std::int64_t groups, std::int64_t d,
                    bool& first) {
    const std::int64_t width = d / Compute::values;
    for (std::int64_t key = 0; key < segment.tokens; key += kTile) {
        const std::int64_t count = segment.tokens - key < kTile ? segment.tokens - key : kTile;
        pack_rows<Compute>(segment.keys, key, count, d, parts.keys);
        pack_columns<Compute>(segment.values, key, count, d, parts.values);
        LogitScale scale{segment.factor, parts.shift, 0};
        parts.shift[0] = segment.shift;
        if (segment.bias) {
            scale.step = 1;
            for (std::int64_t k = 0; k < count; ++k) parts.shift[k] = segment.shift + segment.bias[key + k] * kLog2E;
        }
        for (std::int64_t g = 0; g < groups; ++g) {
            attend<Compute>(parts.queries + g * L * width, parts.keys, parts.values, count, d, scale, nullptr,
                            {parts.top + g * L, parts.total + g * L}, first, parts.logits, parts.sums + g * L * d);
        }
        first = false;
    }
}

template <class Compute>
void shared_unit(const SharedAttention& a, std::int64_t unit, char* base) {
    const SharedScratch parts = shared_parts(a, base);
    const std::int64_t chunks = (a.tokens + a.chunk - 1) / a.chunk;
    const std::int64_t first_query = unit % chunks * a.chunk, head = unit / chunks % a.heads;
    const std::int64_t row = unit / chunks / a.heads, width = a.d / Compute::values;
    const std::int64_t queries = a.tokens - first_query < a.chunk ? a.tokens - first_query : a.chunk;
    const std::int64_t groups = (queries + L - 1) / L;
    const std::int64_t* page = a.page + row * a.references;

    bool refers = false;
    for (std::int64_t r = 0; r < a.references; ++r) refers = refers || page[r] >= 0;
    refers = refers && a.mode[row] != 0;

    Rows own[3] = {rows_of(a.q, row, head), rows_of(a.k, row, head), rows_of(a.v, row, head)};
    for (int i = 0; refers && i < a.moved; ++i) {
        own[i].gain = channels_of(a.gain, i, row, head);
        own[i].offset = channels_of(a.offset, i, row, head);
    }
    for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t begin = g * L, count = queries - begin < L ? queries - begin : L;
        pack_queries<Compute>(own[0], first_query + begin, count, a.d, parts.spare, parts.queries + begin * width);
        start({parts.top + begin, parts.total + begin});
    }

    const float factor = kLog2E / __builtin_sqrtf(static_cast<float>(a.d));
    bool first = true;
    if (!refers || a.mode[row] == 1) {
        attend_segment<Compute>({own[1], own[2], a.tokens, factor, 0.0f, nullptr}, parts, groups, a.d, first);
    }
    for (std::int64_t r = 0; refers && r < a.references; ++r) {
        const std::int64_t p = page[r], index = row * a.references + r;
        if (p < 0 || a.shift[index] == -__builtin_inff()) continue;
        SharedSegment segment{{}, {}, 0, factor * a.scale[index], a.shift[index] * kLog2E, nullptr};
        if (p < a.rows) {
            segment.keys = rows_of(a.k, p, head);
            segment.values = rows_of(a.v, p, head);
            segment.tokens = a.tokens;
        } else {
            segment.keys = rows_of(a.pool_k, p - a.rows, head);
            segment.values = rows_of(a.pool_v, p - a.rows, head);
            segment.keys.gain = channels_of(a.pool_k_scale, 0, p - a.rows, head);
            segment.values.gain = channels_of(a.pool_v_scale, 0, p - a.rows, head);
            segment.tokens = a.page_tokens;
        }
        if (a.bias) segment.bias = a.bias + p * a.bias_row;
        attend_segment<Compute>(segment, parts, groups, a.d, first);
    }

    if (first) {  // no token seen
        for (std::int64_t i = 0; i < groups * L * a.d; i += W) Vector::store(parts.sums + i, Vector::zero());
    }
    Rows out = rows_of(a.out, row, head);
    out.data += first_query * out.stride;
    for (std::int64_t begin = 0; begin < queries; begin += L) {
        float* total = parts.total + begin;
        for (int n = 0; n < N; ++n) {
            Vector::store(total + n * W, Vector::inverse_or_zero(Vector::load(total + n * W)));
        }
        store_lanes(parts.sums + begin * a.d, total, queries - begin < L ? queries - begin : L, a.d, out);
        out.data += L * out.stride;
    }
}
