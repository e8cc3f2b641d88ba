// Mean and unbiased variance over the tokens of one (tensor, row, head), two passes over blocks that stay in L1.
// Included inside an unnamed namespace, after tile_kernel.h.

constexpr std::int64_t kStatsBlock = 64;  // tokens

// mean[v] = mean of x - shift over tokens first .. first + count, for `vectors` vectors of channels from c on
template <Element type, int vectors>
STYLEFAST_INLINE void block_mean(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t c, std::int64_t d,
                                 const Floats (&shift)[vectors], Floats (&mean)[vectors]) {
    for (int v = 0; v < vectors; ++v) mean[v] = Vector::zero();
    for (std::int64_t t = 0; t < count; ++t) {
        const char* row = x.data + (first + t) * x.stride;
        for (int v = 0; v < vectors; ++v) {
            const Floats value = Vector::load_as<type>(row, c + v * W, d - c - v * W);
            mean[v] = Vector::add(mean[v], Vector::sub(value, shift[v]));
        }
    }
    const Floats inverse = Vector::all(1.0f / static_cast<float>(count));
    for (int v = 0; v < vectors; ++v) mean[v] = Vector::mul(mean[v], inverse);
}

// All is measured from the mean of the first block, so that a mean far from 0 costs no digits. Blocks merge by
//   mean += delta * part, squares += squares of the block + delta^2 * before * part, part = block / (before + block)
template <Element type, int vectors>
void column_stats(const Rows& x, std::int64_t c, std::int64_t tokens, std::int64_t d, float* mean, float* variance) {
    Floats zero[vectors], shift[vectors], middle[vectors], squares[vectors], block[vectors];
    for (int v = 0; v < vectors; ++v) zero[v] = middle[v] = squares[v] = Vector::zero();
    block_mean<type, vectors>(x, 0, tokens < kStatsBlock ? tokens : kStatsBlock, c, d, zero, shift);
    for (std::int64_t first = 0; first < tokens; first += kStatsBlock) {
        const std::int64_t count = tokens - first < kStatsBlock ? tokens - first : kStatsBlock;
        const float part = static_cast<float>(count) / static_cast<float>(first + count);
        const Floats weight = Vector::all(part), spread = Vector::all(static_cast<float>(first) * part);
        block_mean<type, vectors>(x, first, count, c, d, shift, block);
        for (int v = 0; v < vectors; ++v) {
            const Floats delta = Vector::sub(block[v], middle[v]);
            middle[v] = Vector::fma(delta, weight, middle[v]);
            squares[v] = Vector::fma(Vector::mul(delta, delta), spread, squares[v]);
        }
        Floats within[vectors];
        for (int v = 0; v < vectors; ++v) within[v] = Vector::zero();
        for (std::int64_t t = first; t < first + count; ++t) {
            for (int v = 0; v < vectors; ++v) {
                const Floats value = Vector::load_as<type>(x.data + t * x.stride, c + v * W, d - c - v * W);
                const Floats away = Vector::sub(Vector::sub(value, shift[v]), block[v]);
                within[v] = Vector::fma(away, away, within[v]);
            }
        }
        for (int v = 0; v < vectors; ++v) squares[v] = Vector::add(squares[v], within[v]);
    }
    const Floats freedom = Vector::all(tokens > 1 ? 1.0f / static_cast<float>(tokens - 1) : 0.0f);
    for (int v = 0; v < vectors; ++v) {
        const std::int64_t at = c + v * W;
        Vector::store(mean + at, Vector::add(shift[v], middle[v]), d - at);
        Vector::store(variance + at, Vector::mul(squares[v], freedom), d - at);
    }
}

template <Element type>
void head_stats(const Rows& x, std::int64_t tokens, std::int64_t d, float* mean, float* variance) {
    std::int64_t c = 0;
    for (; c + 3 * W < d; c += 4 * W) column_stats<type, 4>(x, c, tokens, d, mean, variance);
    for (; c + W < d; c += 2 * W) column_stats<type, 2>(x, c, tokens, d, mean, variance);
    for (; c < d; c += W) column_stats<type, 1>(x, c, tokens, d, mean, variance);
}

inline void stats_unit(const TokenStats& a, std::int64_t unit) {
    const std::int64_t head = unit % a.heads, row = unit / a.heads % a.rows, tensor = unit / a.heads / a.rows;
    const Rows x = rows_of(a.x[tensor], row, head);
    float* mean = const_cast<float*>(channels_of(a.mean, tensor, row, head));
    float* variance = const_cast<float*>(channels_of(a.variance, tensor, row, head));
    switch (x.type) {
        case Element::f32: return head_stats<Element::f32>(x, a.tokens, a.d, mean, variance);
        case Element::bf16: return head_stats<Element::bf16>(x, a.tokens, a.d, mean, variance);
        case Element::f16: return head_stats<Element::f16>(x, a.tokens, a.d, mean, variance);
        case Element::f8: return head_stats<Element::f8>(x, a.tokens, a.d, mean, variance);
    }
}
