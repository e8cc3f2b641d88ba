// Mean and unbiased variance over the tokens of one (tensor, row, head), two passes over blocks that stay in L1.
// Included inside an unnamed namespace, after adain_affine_kernel.h.

constexpr std::int64_t kStatsBlock = 64;  // tokens

// Channels of some tokens; several vectors are always whole, one may hold fewer channels and has 0 in its other lanes.
template <Element type, int vectors>
struct Columns {
    const char* data;
    std::int64_t stride;  // from token to token, bytes
    std::int64_t channels;

    STYLEFAST_INLINE Floats at(std::int64_t token, int v) const {
        const char* from = data + token * stride + v * (W * kBytes<type>);
        if constexpr (vectors > 1) return Vector::load_as<type>(from);
        return Vector::load_as<type>(from, 0, channels);
    }
};

// About the means of tokens first .. first + count. 0 where that is small beside the numbers themselves: distances from
// 0 need no rounding.
template <Element type, int vectors>
STYLEFAST_INLINE void rough_means(const Columns<type, vectors>& x, std::int64_t first, std::int64_t count,
                                  Floats (&mean)[vectors]) {
    for (int v = 0; v < vectors; ++v) mean[v] = Vector::zero();
    std::int64_t t = first;
    for (; t + 4 <= first + count; t += 4) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            mean[v] = Vector::add(mean[v], sum_of_four(x.at(t, v), x.at(t + 1, v), x.at(t + 2, v), x.at(t + 3, v)));
        }
    }
    for (; t < first + count; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) mean[v] = Vector::add(mean[v], x.at(t, v));
    }
    const Floats inverse = Vector::all(1.0f / static_cast<float>(count));
    for (int v = 0; v < vectors; ++v) {
        Floats largest = Vector::zero();
        for (t = first; t < first + least(4, count); ++t) largest = Vector::max(largest, Vector::magnitude(x.at(t, v)));
        mean[v] = Vector::mul(mean[v], inverse);
        const Floats excess = Vector::sub(Vector::mul(Vector::magnitude(mean[v]), Vector::all(4.0f)), largest);
        mean[v] = Vector::where_negative(excess, Vector::zero(), mean[v]);
    }
}

// sums of distances from `centre` and of their squares; four tokens meet in fp32, everything beyond is double
template <Element type, int vectors>
STYLEFAST_INLINE void add_distances(const Columns<type, vectors>& x, std::int64_t first, std::int64_t count,
                                    const Floats (&centre)[vectors], Wide (&sum)[vectors], Wide (&squares)[vectors]) {
    std::int64_t t = first;
    for (; t + 4 <= first + count; t += 4) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const Floats a = Vector::sub(x.at(t, v), centre[v]), b = Vector::sub(x.at(t + 1, v), centre[v]);
            const Floats c = Vector::sub(x.at(t + 2, v), centre[v]), d = Vector::sub(x.at(t + 3, v), centre[v]);
            sum[v] = sum[v] + Wide::of(sum_of_four(a, b, c, d));
            squares[v] = squares[v] + Wide::of(squares_of_four(a, b, c, d));
        }
    }
    for (; t < first + count; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const Floats away = Vector::sub(x.at(t, v), centre[v]);
            sum[v] = sum[v] + Wide::of(away);
            squares[v] = squares[v] + Wide::of(Vector::mul(away, away));
        }
    }
}

// Blocks merge by
//   mean += delta * part, squares += squares of the block + delta^2 * before * part, part = block / (before + block)
template <Element type, int vectors>
void column_stats(const Columns<type, vectors>& x, std::int64_t tokens, float* mean, float* variance) {
    Wide middle[vectors], squares[vectors];
    for (int v = 0; v < vectors; ++v) middle[v] = squares[v] = Wide::all(0.0);
    for (std::int64_t first = 0; first < tokens; first += kStatsBlock) {
        const std::int64_t count = least(kStatsBlock, tokens - first);
        const double number = static_cast<double>(count);
        Floats centre[vectors];
        Wide block[vectors], within[vectors];
        for (int v = 0; v < vectors; ++v) block[v] = within[v] = Wide::all(0.0);
        rough_means<type, vectors>(x, first, count, centre);
        add_distances<type, vectors>(x, first, count, centre, block, within);
        for (int v = 0; v < vectors; ++v) {
            const Wide slip = block[v] * Wide::all(1.0 / number);
            within[v] = within[v] - block[v] * slip;
            block[v] = Wide::of(centre[v]) + slip;
        }

        const double part = number / static_cast<double>(first + count);
        const Wide weight = Wide::all(part), spread = Wide::all(static_cast<double>(first) * part);
        for (int v = 0; v < vectors; ++v) {
            const Wide delta = block[v] - middle[v];
            middle[v] = middle[v] + delta * weight;
            squares[v] = squares[v] + within[v] + delta * delta * spread;
        }
    }
    const Wide freedom = Wide::all(tokens > 1 ? 1.0 / static_cast<double>(tokens - 1) : 0.0);
    for (int v = 0; v < vectors; ++v) {
        // a NaN stays: of two numbers of which one is NaN, max gives the second
        const Floats spread = Vector::max(Vector::zero(), (squares[v] * freedom).narrow());
        Vector::store(mean + v * W, middle[v].narrow(), x.channels - v * W);
        Vector::store(variance + v * W, spread, x.channels - v * W);
    }
}

template <Element type>
void head_stats(const TokenStats& a, std::int64_t tensor, std::int64_t row, std::int64_t head) {
    const Tokens& x = a.x[tensor];
    const char* data = x.data + row * x.row + head * x.head;
    float* mean = channels_of(a.mean, tensor, row, head);
    float* variance = channels_of(a.variance, tensor, row, head);
    std::int64_t c = 0;
    for (; c + 4 * W <= a.d; c += 4 * W) {
        column_stats<type, 4>({data + c * kBytes<type>, x.token, a.d - c}, a.tokens, mean + c, variance + c);
    }
    for (; c + 2 * W <= a.d; c += 2 * W) {
        column_stats<type, 2>({data + c * kBytes<type>, x.token, a.d - c}, a.tokens, mean + c, variance + c);
    }
    for (; c < a.d; c += W) {
        column_stats<type, 1>({data + c * kBytes<type>, x.token, a.d - c}, a.tokens, mean + c, variance + c);
    }
}

inline void token_stats(const TokenStats& a, std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
        const std::int64_t head = piece % a.heads, row = piece / a.heads % a.rows, tensor = piece / a.heads / a.rows;
        STYLEFAST_BY_TYPE(a.x[tensor].type, head_stats, a, tensor, row, head)
    }
}
