// Attention over one tile of keys, transposed: the lanes of a vector are queries, so that softmax has no sum across
// lanes. Included inside an unnamed namespace, after the instruction set's `Vector`.
//
// Operands are 32-bit words: a float, or two bf16 that one instruction multiplies and adds. `Compute` says which:
//   values     numbers in a word
//   step       sum + left * right over a word's numbers
//   Exp2       the polynomial for 2^x on [0, 1), 1 at 0
//   adjacent   two vectors of floats -> words of neighbours       (values == 2)
//   pair       two vectors of floats -> words of equal lanes      (values == 2)

using Floats = Vector::Floats;
constexpr int W = Vector::lanes;
constexpr int N = Vector::group_vectors;
constexpr int M = Vector::block_rows;
constexpr int L = W * N;   // queries of a group
constexpr int kTile = 96;  // keys of a tile: even, and a multiple of M
constexpr float kLowest = -__FLT_MAX__;
constexpr float kLog2E = 1.44269504088896340736f;

// tokens of one (row or page, head)
struct Rows {
    const char* data;
    Element type;
    std::int64_t stride;  // bytes
    const float* gain;    // [d]: every token is x * gain + offset; null for x as it is
    const float* offset;  // [d], null for 0
};

STYLEFAST_INLINE std::int64_t round_up(std::int64_t x, std::int64_t unit) { return (x + unit - 1) / unit * unit; }

STYLEFAST_INLINE Rows rows_of(const Tokens& x, std::int64_t row, std::int64_t head) {
    return {x.data + row * x.row + head * x.head, x.type, x.token, nullptr, nullptr};
}

STYLEFAST_INLINE const float* channels_of(const Channels& x, std::int64_t tensor, std::int64_t row, std::int64_t head) {
    return x.data ? x.data + tensor * x.tensor + row * x.row + head * x.head : nullptr;
}

template <Element type>
STYLEFAST_INLINE Floats token(const Rows& x, const char* row, std::int64_t c, std::int64_t d) {
    Floats value = Vector::load_as<type>(row, c, d - c);
    if (x.gain) {
        const Floats gain = Vector::load(x.gain + c, d - c);
        value = x.offset ? Vector::fma(value, gain, Vector::load(x.offset + c, d - c)) : Vector::mul(value, gain);
    }
    return value;
}

// tokens first .. first + count as words [count, d / values]
template <class Compute, Element type>
void pack_rows_as(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t d, float* words) {
    for (std::int64_t i = 0; i < count; ++i) {
        const char* row = x.data + (first + i) * x.stride;
        if constexpr (Compute::values == 1) {
            for (std::int64_t c = 0; c < d; c += W) Vector::store(words + i * d + c, token<type>(x, row, c, d), d - c);
        } else {
            const std::int64_t width = d / 2;
            float* to = words + i * width;
            if (type == Element::bf16 && !x.gain) {
                for (std::int64_t c = 0; c < width; c += W) {
                    Vector::store(to + c, Vector::load(row + 4 * c, width - c), width - c);
                }
                continue;
            }
            for (std::int64_t c = 0; c < width; c += W) {
                const Floats low = token<type>(x, row, 2 * c, d), high = token<type>(x, row, 2 * c + W, d);
                Vector::store(to + c, Compute::adjacent(low, high), width - c);
            }
        }
    }
}

// the same with words of neighbouring tokens, [ceil(count / values), d]; a missing last token is 0
template <class Compute, Element type>
void pack_columns_as(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t d, float* words) {
    if constexpr (Compute::values == 1) {
        pack_rows_as<Compute, type>(x, first, count, d, words);
    } else {
        for (std::int64_t i = 0; i < count; i += 2) {
            const char* row = x.data + (first + i) * x.stride;
            float* to = words + i / 2 * d;
            for (std::int64_t c = 0; c < d; c += W) {
                const Floats one = token<type>(x, row, c, d);
                const Floats two = i + 1 < count ? token<type>(x, row + x.stride, c, d) : Vector::zero();
                Vector::store(to + c, Compute::pair(one, two), d - c);
            }
        }
    }
}

template <class Compute>
void pack_rows(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t d, float* words) {
    if (x.type == Element::bf16) return pack_rows_as<Compute, Element::bf16>(x, first, count, d, words);
    if (x.type == Element::f8) return pack_rows_as<Compute, Element::f8>(x, first, count, d, words);
    if constexpr (Compute::values == 1) {
        if (x.type == Element::f32) return pack_rows_as<Compute, Element::f32>(x, first, count, d, words);
        return pack_rows_as<Compute, Element::f16>(x, first, count, d, words);
    }
}

template <class Compute>
void pack_columns(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t d, float* words) {
    if (x.type == Element::bf16) return pack_columns_as<Compute, Element::bf16>(x, first, count, d, words);
    if (x.type == Element::f8) return pack_columns_as<Compute, Element::f8>(x, first, count, d, words);
    if constexpr (Compute::values == 1) {
        if (x.type == Element::f32) return pack_columns_as<Compute, Element::f32>(x, first, count, d, words);
        return pack_columns_as<Compute, Element::f16>(x, first, count, d, words);
    }
}

// up to L queries as words [d / values, L]; lanes without a query are 0. `spare` holds [L, d / values]
template <class Compute>
void pack_queries(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t d, float* spare, float* words) {
    const std::int64_t width = d / Compute::values;
    const char* from = x.data + first * x.stride;
    std::int64_t stride = x.stride;
    const bool as_it_is = !x.gain && x.type == (Compute::values == 1 ? Element::f32 : Element::bf16);
    if (!as_it_is) {
        pack_rows<Compute>(x, first, count, d, spare);
        from = reinterpret_cast<const char*>(spare);
        stride = width * 4;
    }
    for (std::int64_t lane = 0; lane < L; lane += W) {
        for (std::int64_t c = 0; c < width; c += W) {
            Floats block[W];
            for (int i = 0; i < W; ++i) {
                const bool there = lane + i < count;
                block[i] = there ? Vector::load(from + (lane + i) * stride + 4 * c, width - c) : Vector::zero();
            }
            Vector::transpose(block);
            const std::int64_t columns = width - c < W ? width - c : W;
            for (std::int64_t j = 0; j < columns; ++j) Vector::store(words + (c + j) * L + lane, block[j]);
        }
    }
}

// out[i] = sums[:, i] * factor[i] for the first `count` lanes; sums [d, L], factor [L]
template <Element type>
void store_lanes_as(const float* sums, const float* factor, std::int64_t count, std::int64_t d, char* out,
                    std::int64_t stride) {
    for (std::int64_t lane = 0; lane < count; lane += W) {
        const Floats scale = Vector::load(factor + lane);
        const std::int64_t rows = count - lane < W ? count - lane : W;
        for (std::int64_t c = 0; c < d; c += W) {
            Floats block[W];
            for (int j = 0; j < W; ++j) {
                const bool there = c + j < d;
                block[j] = there ? Vector::mul(Vector::load(sums + (c + j) * L + lane), scale) : Vector::zero();
            }
            Vector::transpose(block);
            for (std::int64_t i = 0; i < rows; ++i) {
                Vector::store_as<type>(out + (lane + i) * stride, c, d - c, block[i]);
            }
        }
    }
}

inline void store_lanes(const float* sums, const float* factor, std::int64_t count, std::int64_t d, const Rows& out) {
    char* to = const_cast<char*>(out.data);
    if (out.type == Element::f32) return store_lanes_as<Element::f32>(sums, factor, count, d, to, out.stride);
    if (out.type == Element::f16) return store_lanes_as<Element::f16>(sums, factor, count, d, to, out.stride);
    store_lanes_as<Element::bf16>(sums, factor, count, d, to, out.stride);
}

// sums[m][n] = sum over s of left[m * row + s * step] * right[s][n]
template <class Compute, int rows>
STYLEFAST_INLINE void multiply(const float* left, std::int64_t row, std::int64_t step, std::int64_t steps,
                               const float* right, Floats (&sums)[rows][N]) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[m][n] = Vector::zero();
    }
    for (std::int64_t s = 0; s < steps; ++s) {
        Floats columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) columns[n] = Vector::load(right + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const Floats x = Vector::all(left[m * row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] = Compute::step(sums[m][n], x, columns[n]);
        }
        left += step;
        right += L;
    }
}

// logits of keys [count, width] and queries [width, L]: to [count, L] = product * factor + shift, and their maximum
struct LogitScale {
    float factor;
    const float* shift;
    std::int64_t step;  // of `shift` from key to key; 0: one for all
};

template <class Compute, int rows>
void logit_rows(const float* keys, std::int64_t width, const float* queries, LogitScale scale, float* to,
                Floats (&top)[N]) {
    Floats sums[rows][N];
    multiply<Compute, rows>(keys, width, 1, width, queries, sums);
    const Floats factor = Vector::all(scale.factor);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
        const Floats shift = Vector::all(scale.shift[m * scale.step]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const Floats logit = Vector::fma(sums[m][n], factor, shift);
            top[n] = Vector::max(top[n], logit);
            Vector::store(to + m * L + n * W, logit);
        }
    }
}

template <class Compute, int rows>
STYLEFAST_INLINE void last_logit_rows(std::int64_t count, const float* keys, std::int64_t width, const float* queries,
                                      LogitScale scale, float* to, Floats (&top)[N]) {
    if constexpr (rows > 0) {
        if (count == rows) return logit_rows<Compute, rows>(keys, width, queries, scale, to, top);
        last_logit_rows<Compute, rows - 1>(count, keys, width, queries, scale, to, top);
    }
}

template <class Compute>
void logits(const float* keys, std::int64_t count, std::int64_t width, const float* queries, LogitScale scale,
            float* to, Floats (&top)[N]) {
    for (; count >= M; count -= M) {
        logit_rows<Compute, M>(keys, width, queries, scale, to, top);
        keys += M * width;
        to += M * L;
        scale.shift += M * scale.step;
    }
    last_logit_rows<Compute, M - 1>(count, keys, width, queries, scale, to, top);
}

// logits [count, L] -> weights as words [ceil(count / values), L] in the same place; `sums` gets them before the gate
template <class Compute, bool gated>
void weigh_as(float* logits, std::int64_t count, const Floats (&top)[N], const float* gate, Floats (&sums)[N]) {
    using Exp2 = typename Compute::Exp2;
    constexpr int values = Compute::values;
    Floats gates[N];
    if constexpr (gated) {
        for (int n = 0; n < N; ++n) gates[n] = Vector::load(gate + n * W);
    }
    for (std::int64_t k = 0; k < count; k += values) {
        const float* from = logits + k * L;
        float* to = logits + k / values * L;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Floats one = Vector::exp2<Exp2>(Vector::sub(Vector::load(from + n * W), top[n]));
            sums[n] = Vector::add(sums[n], one);
            if constexpr (gated) one = Vector::mul(one, gates[n]);
            if constexpr (values == 1) {
                Vector::store(to + n * W, one);
            } else {
                Floats two = Vector::zero();
                if (k + 1 < count) {
                    two = Vector::exp2<Exp2>(Vector::sub(Vector::load(from + L + n * W), top[n]));
                    sums[n] = Vector::add(sums[n], two);
                    if constexpr (gated) two = Vector::mul(two, gates[n]);
                }
                Vector::store(to + n * W, Compute::pair(one, two));
            }
        }
    }
}

template <class Compute>
void weigh(float* logits, std::int64_t count, const Floats (&top)[N], const float* gate, Floats (&sums)[N]) {
    if (gate) return weigh_as<Compute, true>(logits, count, top, gate, sums);
    weigh_as<Compute, false>(logits, count, top, nullptr, sums);
}

enum class Into {
    assign,   // to = product * factor
    add,      // to = to + product * factor
    rescale,  // to = to * factor + product
};

// product of values [steps, d] and weights [steps, L] into `to` [d, L], factor [L]
template <class Compute, Into into, int rows>
void value_rows(const float* values, std::int64_t d, std::int64_t steps, const float* weights,
                const Floats (&factor)[N], float* to) {
    Floats sums[rows][N];
    multiply<Compute, rows>(values, 1, d, steps, weights, sums);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            float* place = to + m * L + n * W;
            Floats x = sums[m][n];
            if constexpr (into == Into::assign) x = Vector::mul(x, factor[n]);
            if constexpr (into == Into::add) x = Vector::fma(x, factor[n], Vector::load(place));
            if constexpr (into == Into::rescale) x = Vector::fma(Vector::load(place), factor[n], x);
            Vector::store(place, x);
        }
    }
}

template <class Compute, Into into, int rows>
STYLEFAST_INLINE void last_value_rows(std::int64_t count, const float* values, std::int64_t d, std::int64_t steps,
                                      const float* weights, const Floats (&factor)[N], float* to) {
    if constexpr (rows > 0) {
        if (count == rows) return value_rows<Compute, into, rows>(values, d, steps, weights, factor, to);
        last_value_rows<Compute, into, rows - 1>(count, values, d, steps, weights, factor, to);
    }
}

template <class Compute, Into into>
void accumulate(const float* values, std::int64_t d, std::int64_t keys, const float* weights, const Floats (&factor)[N],
                float* to) {
    const std::int64_t steps = (keys + Compute::values - 1) / Compute::values;
    std::int64_t c = 0;
    for (; c + M <= d; c += M) value_rows<Compute, into, M>(values + c, d, steps, weights, factor, to + c * L);
    last_value_rows<Compute, into, M - 1>(d - c, values + c, d, steps, weights, factor, to + c * L);
}

// softmax over several tiles: the running maximum and sum of every query of a group
struct Running {
    float* top;    // [L]
    float* total;  // [L]
};

inline void start(Running state) {
    for (int n = 0; n < N; ++n) {
        Vector::store(state.top + n * W, Vector::all(kLowest));
        Vector::store(state.total + n * W, Vector::zero());
    }
}

// one tile more: keys [count, d / values], values [ceil(count / values), d], sums [d, L]; `first` overwrites the sums
template <class Compute>
void attend(const float* queries, const float* keys, const float* values, std::int64_t count, std::int64_t d,
            LogitScale scale, const float* gate, Running state, bool first, float* spare, float* sums) {
    Floats top[N], rescale[N], tile_total[N];
    for (int n = 0; n < N; ++n) top[n] = Vector::load(state.top + n * W);
    logits<Compute>(keys, count, d / Compute::values, queries, scale, spare, top);
    for (int n = 0; n < N; ++n) {
        rescale[n] = Vector::exp2<typename Compute::Exp2>(Vector::sub(Vector::load(state.top + n * W), top[n]));
        Vector::store(state.top + n * W, top[n]);
        tile_total[n] = Vector::zero();
    }
    weigh<Compute>(spare, count, top, gate, tile_total);
    for (int n = 0; n < N; ++n) {
        const Floats total = Vector::load(state.total + n * W);
        Vector::store(state.total + n * W, Vector::fma(total, rescale[n], tile_total[n]));
    }
    if (first) {
        for (int n = 0; n < N; ++n) rescale[n] = Vector::all(1.0f);
        accumulate<Compute, Into::assign>(values, d, count, spare, rescale, sums);
    } else {
        accumulate<Compute, Into::rescale>(values, d, count, spare, rescale, sums);
    }
}

// hands out the parts of a thread's scratch, each on its own cache line; a null base only counts
struct Scratch {
    char* base;
    std::size_t used = 0;

    float* floats(std::int64_t count) {
        float* part = base ? reinterpret_cast<float*>(base + used) : nullptr;
        used += static_cast<std::size_t>(round_up(count * 4, 64));
        return part;
    }
};
