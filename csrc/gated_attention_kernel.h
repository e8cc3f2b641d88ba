// One unit of gated cross-attention: `chunk` queries of one (row, head) over the text and the image segments.
// Included inside an unnamed namespace, after tile_kernel.h.

// keys and values that this unit packs once; beyond that, every group of queries packs its tiles again
constexpr std::int64_t kPackedBytes = 512 * 1024;

struct GatedMember {  // the text or one image segment
    Rows keys, values;
    std::int64_t tokens;
    std::int64_t slot;   // where its keys stand among the packed ones
    float strength;      // not used by the text
    const float* mask;   // [tokens of q], null for everywhere
    float* gate;         // [L], null for the text
    std::int64_t group;  // -1 for the text
};

struct GatedScratch {
    float *queries, *sums, *spare, *more_sums, *top, *total, *logits, *keys, *values, *gates;
    GatedMember* members;
    std::size_t bytes;
    std::int64_t slots;  // keys that `keys` and `values` hold
};

inline GatedScratch gated_parts(const GatedCrossAttention& a, char* base) {
    Scratch scratch{base};
    GatedScratch parts;
    const std::int64_t fit = kPackedBytes / (2 * 4 * a.d);
    parts.slots = fit > 2 * kTile ? round_up(fit - kTile, 2) : kTile;
    parts.queries = scratch.floats(L * a.d);
    parts.sums = scratch.floats(L * a.d);
    parts.spare = scratch.floats(L * a.d);
    parts.more_sums = scratch.floats(L * a.d);
    parts.top = scratch.floats(L);
    parts.total = scratch.floats(L);
    parts.logits = scratch.floats(kTile * L);
    parts.keys = scratch.floats(parts.slots * a.d);
    parts.values = scratch.floats(parts.slots * a.d);
    parts.gates = scratch.floats(a.segments * L);
    parts.members = reinterpret_cast<GatedMember*>(
        scratch.floats((a.segments + 1) * static_cast<std::int64_t>(sizeof(GatedMember)) / 4));
    parts.bytes = scratch.used;
    return parts;
}

inline std::size_t gated_scratch(const GatedCrossAttention& a) { return gated_parts(a, nullptr).bytes; }

// the text, then the active segments of this row, those of one softmax side by side; returns how many
inline std::int64_t gated_members(const GatedCrossAttention& a, std::int64_t row, std::int64_t head,
                                  const GatedScratch& parts) {
    GatedMember* members = parts.members;
    const std::int64_t text = a.text_page[row];
    const std::int64_t length = a.text_lengths ? a.text_lengths[text] : a.text_tokens;
    members[0] = {rows_of(a.text_k, text, head), rows_of(a.text_v, text, head), length, 0, 0.0f, nullptr, nullptr, -1};
    std::int64_t count = 1;
    const std::int64_t* page = a.image_page + row * a.segments;
    const float* strength = a.strength + row * a.segments;
    const std::int64_t* group = a.group + row * a.segments;
    const auto active = [&](std::int64_t s) { return page[s] >= 0 && strength[s] != 0.0f; };
    for (std::int64_t s = 0; s < a.segments; ++s) {
        bool led = !active(s);  // an earlier segment has brought this one along
        for (std::int64_t t = 0; t < s && !led; ++t) led = active(t) && group[t] == group[s];
        for (std::int64_t t = s; t < a.segments && !led; ++t) {
            if (!active(t) || group[t] != group[s]) continue;
            const std::int64_t mask = a.masks ? a.mask_index[row * a.segments + t] : -1;
            members[count] = {rows_of(a.image_k, page[t], head),
                              rows_of(a.image_v, page[t], head),
                              a.image_lengths[page[t]],
                              0,
                              strength[t],
                              mask >= 0 ? a.masks + mask * a.mask_row : nullptr,
                              parts.gates + (count - 1) * L,
                              s};
            ++count;
        }
    }
    return count;
}

// a softmax whose keys fit into one tile: sums (+)= gated weights * values / total
template <class Compute>
void attend_once(const GatedMember* begin, const GatedMember* end, const GatedScratch& parts, std::int64_t d,
                 LogitScale scale, bool first) {
    const std::int64_t width = d / Compute::values;
    Floats top[N], total[N];
    for (int n = 0; n < N; ++n) {
        top[n] = Vector::all(kLowest);
        total[n] = Vector::zero();
    }
    float* to = parts.logits;
    for (const GatedMember* m = begin; m != end; ++m) {
        logits<Compute>(parts.keys + m->slot * width, m->tokens, width, parts.queries, scale, to, top);
        to += round_up(m->tokens, Compute::values) * L;
    }
    to = parts.logits;
    for (const GatedMember* m = begin; m != end; ++m) {
        weigh<Compute>(to, m->tokens, top, m->gate, total);
        to += round_up(m->tokens, Compute::values) * L;
    }
    for (int n = 0; n < N; ++n) total[n] = Vector::inverse_or_zero(total[n]);
    to = parts.logits;
    for (const GatedMember* m = begin; m != end; ++m) {
        const float* values = parts.values + m->slot / Compute::values * d;
        if (first) {
            accumulate<Compute, Into::assign>(values, d, m->tokens, to, total, parts.sums);
        } else {
            accumulate<Compute, Into::add>(values, d, m->tokens, to, total, parts.sums);
        }
        first = false;
        to += round_up(m->tokens, Compute::values) * L;
    }
}

// a softmax over any number of keys, tile by tile; `packed`: the keys are in place
template <class Compute>
void attend_tiles(const GatedMember* begin, const GatedMember* end, const GatedScratch& parts, std::int64_t d,
                  LogitScale scale, bool packed, bool first) {
    const std::int64_t width = d / Compute::values;
    float* sums = first ? parts.sums : parts.more_sums;
    const Running state{parts.top, parts.total};
    start(state);
    bool first_tile = true;
    for (const GatedMember* m = begin; m != end; ++m) {
        for (std::int64_t key = 0; key < m->tokens; key += kTile) {
            const std::int64_t count = m->tokens - key < kTile ? m->tokens - key : kTile;
            const std::int64_t slot = packed ? m->slot + key : 0;
            float* keys = parts.keys + slot * width;
            float* values = parts.values + slot / Compute::values * d;
            if (!packed) {
                pack_rows<Compute>(m->keys, key, count, d, keys);
                pack_columns<Compute>(m->values, key, count, d, values);
            }
            attend<Compute>(parts.queries, keys, values, count, d, scale, m->gate, state, first_tile, parts.logits,
                            sums);
            first_tile = false;
        }
    }
    for (int n = 0; n < N; ++n) {
        const Floats factor = Vector::inverse_or_zero(Vector::load(parts.total + n * W));
        for (std::int64_t c = 0; c < d; ++c) {
            float* place = parts.sums + c * L + n * W;
            const Floats x = Vector::load(sums + c * L + n * W);
            Vector::store(place, first ? Vector::mul(x, factor) : Vector::fma(x, factor, Vector::load(place)));
        }
    }
}

template <class Compute>
void gated_unit(const GatedCrossAttention& a, std::int64_t unit, char* base) {
    const GatedScratch parts = gated_parts(a, base);
    const std::int64_t chunks = (a.tokens + a.chunk - 1) / a.chunk;
    const std::int64_t first_query = unit % chunks * a.chunk, head = unit / chunks % a.heads;
    const std::int64_t row = unit / chunks / a.heads, width = a.d / Compute::values;
    const std::int64_t queries = a.tokens - first_query < a.chunk ? a.tokens - first_query : a.chunk;

    GatedMember* const members = parts.members;
    GatedMember* const end = members + gated_members(a, row, head, parts);
    std::int64_t slots = 0;
    for (GatedMember* m = members; m != end; ++m) {
        m->slot = slots;
        slots += round_up(m->tokens, Compute::values);
    }
    const bool packed = slots <= parts.slots;
    for (GatedMember* m = members; packed && m != end; ++m) {
        pack_rows<Compute>(m->keys, 0, m->tokens, a.d, parts.keys + m->slot * width);
        pack_columns<Compute>(m->values, 0, m->tokens, a.d, parts.values + m->slot / Compute::values * a.d);
    }

    const float no_shift = 0.0f;
    const LogitScale scale{kLog2E / __builtin_sqrtf(static_cast<float>(a.d)), &no_shift, 0};
    const Rows q = rows_of(a.q, row, head);
    Rows out = rows_of(a.out, row, head);
    out.data += first_query * out.stride;
    for (std::int64_t query = 0; query < queries; query += L) {
        const std::int64_t count = queries - query < L ? queries - query : L;
        pack_queries<Compute>(q, first_query + query, count, a.d, parts.spare, parts.queries);
        for (GatedMember* m = members + 1; m < end; ++m) {
            for (std::int64_t i = 0; i < L; ++i) {
                const bool masked = m->mask && i < count;
                m->gate[i] = masked ? m->strength * m->mask[first_query + query + i] : m->strength;
            }
        }
        bool first = true;
        for (const GatedMember *begin = members, *next; begin != end; begin = next) {
            std::int64_t taken = 0;
            for (next = begin; next != end && next->group == begin->group; ++next) {
                taken += round_up(next->tokens, Compute::values);
            }
            if (taken == 0 && !first) continue;
            if (packed && taken > 0 && taken <= kTile) {
                attend_once<Compute>(begin, next, parts, a.d, scale, first);
            } else {
                if (taken == 0) {  // no text at all
                    for (std::int64_t i = 0; i < a.d * L; i += W) Vector::store(parts.sums + i, Vector::zero());
                }
                attend_tiles<Compute>(begin, next, parts, a.d, scale, packed, first);
            }
            first = false;
        }
        for (int n = 0; n < N; ++n) Vector::store(parts.total + n * W, Vector::all(1.0f));
        store_lanes(parts.sums, parts.total, count, a.d, out);
        out.data += L * out.stride;
    }
}
