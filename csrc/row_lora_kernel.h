// LoRAs per row. Included inside an unnamed namespace, after span_kernel.h.
//
// A block of tokens goes through both products while it is in the cache: inner = x A in chunks of channels, then
// y += inner B. Both are small matrix products in registers whose left operand is broadcast: the lanes are ranks in the
// first one, output channels in the second. Operands that are not fp32 are converted in scratch first.

namespace lora {

constexpr std::int64_t kRank = RowLora::rank, kBlock = RowLora::block, kChunk = RowLora::chunk,
                       kPacked = RowLora::packed;
constexpr std::int64_t kRow = RowLora::packed_row;
constexpr int kUnitVectors = kRank / W;      // of one unit's ranks
constexpr int kMostUnits = W == 16 ? 2 : 1;  // multiplied at once: 12 x 2 or 6 x 2 sums
constexpr int kGroup = W == 16 ? 12 : 6;     // tokens whose sums are in registers
constexpr std::int64_t kLine = 64;           // bytes of the caches
constexpr int kTile = Vector::block_rows, kColumns = Vector::group_vectors;
static_assert(kBlock % kGroup == 0 && kBlock % kTile == 0 && kGroup <= RowLora::group);

// The parts of a thread's scratch; RowLora::scratch counts them.
struct Space {
    float* inner;    // [block, units * rank]
    float* tokens;   // [kGroup, kRow]
    float* factors;  // [units, kPacked, rank], then [a part's units, rank, out] and their last columns
};

// What is read next: `step` bytes from token to token. The caches' own prefetchers follow a run, but not several
// tokens.
struct Ahead {
    const char* data;
    std::int64_t step;
};

// to[m] += x[m] a, of `units` units whose chunks lie at a[0], a[1]
template <Element type, int units>
void down_group(const float* x, const float* const* a, std::int64_t channels, float* to, std::int64_t to_row,
                const Ahead& ahead) {
    Floats sums[kGroup][units * kUnitVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kGroup; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < units * kUnitVectors; ++v) sums[m][v] = Vector::zero();
    }
    const float* first = a[0];
    const float* second = a[units - 1];
    for (std::int64_t c = 0; c < channels; ++c) {
        if (c * kBytes<type> % kLine == 0 && ahead.data) {
            for (std::int64_t m = 0; m < kGroup; ++m) {
                __builtin_prefetch(ahead.data + m * ahead.step + c * kBytes<type>);
            }
        }
        Floats ranks[units * kUnitVectors];
#pragma GCC unroll 4
        for (int v = 0; v < units * kUnitVectors; ++v) {
            const float* from = v < kUnitVectors ? first : second;
            ranks[v] = Vector::load(from + c * kRank + v % kUnitVectors * W);
        }
#pragma GCC unroll 16
        for (int m = 0; m < kGroup; ++m) {
            const Floats one = Vector::all(x[m * kRow + c]);
#pragma GCC unroll 4
            for (int v = 0; v < units * kUnitVectors; ++v) sums[m][v] = Vector::fma(one, ranks[v], sums[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kGroup; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < units * kUnitVectors; ++v) {
            float* place = to + m * to_row + v * W;
            Vector::store(place, Vector::add(Vector::load(place), sums[m][v]));
        }
    }
}

// numbers first .. first + count of one type as floats, up to a whole vector
template <Element type>
STYLEFAST_INLINE void widen(const char* from, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; i += W) Vector::store(to + i, load_from<type>(from, i, count));
}

// a block's tokens: their rows, and where they lie in the output
struct Places {
    std::int64_t count, line[kBlock], column[kBlock];
    const RowLora::Row* row[kBlock];
};

inline void locate(const RowLora& a, const RowLora::Group& group, std::int64_t first, Places& places) {
    const std::int64_t tokens = a.height * a.width, token = first % tokens;
    const RowLora::Row* row = group.rows + first / tokens;
    std::int64_t line = token / a.width, column = token % a.width;
    places.count = least(kBlock, group.members * tokens - first);
    for (std::int64_t i = 0; i < places.count; ++i) {
        places.row[i] = row, places.line[i] = line, places.column[i] = column;
        if (++column < a.width) continue;
        column = 0;
        if (++line == a.height) line = 0, ++row;
    }
}

inline const char* row_of(const RowLora& a, const Places& places, std::int64_t i) {
    return a.x.data + places.row[i]->number * a.x.row;
}

// where a token's first tap reads, or would if it were inside
inline const char* pixel(const RowLora& a, const Places& places, std::int64_t i) {
    return row_of(a, places, i) + places.line[i] * a.stride * a.x.line + places.column[i] * a.stride * a.x.pixel;
}

// channels of a group's tokens for one tap; false if none of them is inside
template <Element type>
bool pack_tokens(const RowLora& a, const Places& places, std::int64_t group, std::int64_t tap, std::int64_t channel,
                 std::int64_t channels, float* to) {
    const std::int64_t down = tap / a.side - a.padding, right = tap % a.side - a.padding;
    bool any = false;
    for (std::int64_t m = 0; m < kGroup; ++m, to += kRow) {
        const std::int64_t i = group + m;
        const bool there = i < places.count;
        const std::int64_t line = there ? places.line[i] * a.stride + down : -1;
        const std::int64_t column = there ? places.column[i] * a.stride + right : -1;
        if (line < 0 || line >= a.x_height || column < 0 || column >= a.x_width) {
            __builtin_memset(to, 0, static_cast<std::size_t>(4 * channels));
            continue;
        }
        any = true;
        const char* from = row_of(a, places, i) + line * a.x.line + column * a.x.pixel;
        widen<type>(from + channel * kBytes<type>, channels, to);
    }
    return any;
}

// inner [block, units * rank] = x A, times the scale that each row gives to each unit
template <Element type>
void down_block(const RowLora& a, const Places& places, const std::int64_t* units, std::int64_t count,
                const Space& space) {
    const std::int64_t width = count * kRank, taps = a.side * a.side;
    __builtin_memset(space.inner, 0, static_cast<std::size_t>(4 * kBlock * width));
    for (std::int64_t tap = 0; tap < taps; ++tap) {
        for (std::int64_t channel = 0; channel < a.in; channel += kPacked) {
            const std::int64_t channels = least(kPacked, a.in - channel);
            const auto stored = [&](std::int64_t u) {
                return a.down + ((units[u] * taps + tap) * a.in + channel) * kRank * kBytes<type>;
            };
            if constexpr (type != Element::f32) {
                for (std::int64_t u = 0; u < count; ++u) {
                    widen<type>(stored(u), channels * kRank, space.factors + u * kPacked * kRank);
                }
            }
            const auto factor = [&](std::int64_t u) {
                if constexpr (type == Element::f32) return reinterpret_cast<const float*>(stored(u));
                return static_cast<const float*>(space.factors + u * kPacked * kRank);
            };
            for (std::int64_t group = 0; group < places.count; group += kGroup) {
                if (!pack_tokens<type>(a, places, group, tap, channel, channels, space.tokens)) continue;
                float* to = space.inner + group * width;
                const std::int64_t next = group + kGroup;
                Ahead ahead{nullptr, a.x.pixel * a.stride};
                for (std::int64_t c = 0; c < channels; c += kChunk) {
                    const std::int64_t summed = least(kChunk, channels - c);
                    if (tap == 0 && next < places.count) {
                        ahead.data = pixel(a, places, next) + (channel + c) * kBytes<type>;
                    }
                    std::int64_t u = 0;
                    for (; u + kMostUnits <= count; u += kMostUnits) {
                        const float* chunks[kMostUnits];
                        for (int i = 0; i < kMostUnits; ++i) chunks[i] = factor(u + i) + c * kRank;
                        down_group<type, kMostUnits>(space.tokens + c, chunks, summed, to + u * kRank, width, ahead);
                        ahead.data = nullptr;
                    }
                    for (; u < count; ++u) {
                        const float* chunks[1] = {factor(u) + c * kRank};
                        down_group<type, 1>(space.tokens + c, chunks, summed, to + u * kRank, width, ahead);
                        ahead.data = nullptr;
                    }
                }
            }
        }
    }
    for (std::int64_t i = 0; i < places.count; ++i) {
        for (std::int64_t u = 0; u < count; ++u) {
            float* ranks = space.inner + i * width + u * kRank;
            const Floats scale = Vector::all(places.row[i]->scales[u]);
            for (std::int64_t r = 0; r < kRank; r += W) {
                Vector::store(ranks + r, Vector::mul(scale, Vector::load(ranks + r)));
            }
        }
    }
}

// y[m] += inner[m] b for up to kTile tokens and kColumns vectors; `columns` counts those that are not `whole`
template <Element type, bool whole>
void up_tile(const float* inner, std::int64_t width, const float* const* factors, std::int64_t row, std::int64_t column,
             std::int64_t units, char* const* y, std::int64_t tokens, std::int64_t columns, std::int64_t ahead) {
    Floats sums[kTile][kColumns];
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) sums[m][n] = Vector::zero();
    }
    for (std::int64_t u = 0; u < units; ++u) {
        const float* b = factors[u] + column;
        const float* left = inner + u * kRank;
        for (std::int64_t r = 0; r < kRank; ++r, b += row) {
            if (whole && u == 0 && r * kLine < kColumns * W * kBytes<type>) {
                for (int m = 0; m < kTile; ++m) __builtin_prefetch(y[m < tokens ? m : 0] + ahead + r * kLine, 1);
            }
            Floats right[kColumns];
#pragma GCC unroll 8
            for (int n = 0; n < kColumns; ++n) right[n] = Vector::load(b + n * W);
#pragma GCC unroll 8
            for (int m = 0; m < kTile; ++m) {
                const Floats one = Vector::all(left[m * width + r]);
#pragma GCC unroll 8
                for (int n = 0; n < kColumns; ++n) sums[m][n] = Vector::fma(one, right[n], sums[m][n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m) {
        if (m >= tokens) break;
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) {
            if constexpr (whole) {
                char* place = y[m] + n * W * kBytes<type>;
                Vector::store_as<type>(place, Vector::add(Vector::load_as<type>(place), sums[m][n]));
            } else if (n * W < columns) {
                const Floats before = load_from<type>(y[m], n * W, columns);
                store_to<type>(y[m], n * W, columns, Vector::add(before, sums[m][n]));
            }
        }
    }
}

// y += inner B for one part's units
template <Element type>
void up_block(const RowLora& a, const RowLora::Pixels& y, const Places& places, const std::int64_t* units,
              std::int64_t count, const float* inner, std::int64_t width, float* space, const float** factors) {
    constexpr std::int64_t strip = kColumns * W;
    const std::int64_t whole = a.out / strip * strip, rest = a.out - whole;
    float* last = space;  // the columns that fill no strip, zeros behind them
    const auto of_unit = [&](std::int64_t u) { return a.up + units[u] * kRank * a.out * kBytes<type>; };
    if (rest) {
        for (std::int64_t u = 0; u < count; ++u) {
            for (std::int64_t r = 0; r < kRank; ++r, last += strip) {
                for (std::int64_t c = 0; c < strip; c += W) Vector::store(last + c, Vector::zero());
                widen<type>(of_unit(u) + (r * a.out + whole) * kBytes<type>, rest, last);
            }
        }
    }
    const std::int64_t row = type == Element::f32 ? a.out : whole;
    for (std::int64_t u = 0; u < count; ++u) {
        if constexpr (type == Element::f32) {
            factors[u] = reinterpret_cast<const float*>(of_unit(u));
        } else {
            factors[u] = last;
            for (std::int64_t r = 0; r < kRank; ++r, last += whole) {
                widen<type>(of_unit(u) + r * a.out * kBytes<type>, whole, last);
            }
        }
    }
    const float** lasts = factors + count;
    for (std::int64_t u = 0; u < count; ++u) lasts[u] = space + u * kRank * strip;
    for (std::int64_t i = 0; i < places.count; i += kTile, inner += kTile * width) {
        const std::int64_t tokens = least(kTile, places.count - i);
        char* to[kTile];
        for (std::int64_t m = 0; m < tokens; ++m) {
            to[m] = y.data + places.row[i + m]->number * y.row + places.line[i + m] * y.line +
                    places.column[i + m] * y.pixel;
        }
        for (std::int64_t c = 0; c < whole; c += strip) {
            up_tile<type, true>(inner, width, factors, row, c, count, to, tokens, strip, kTile * y.pixel);
            for (std::int64_t m = 0; m < tokens; ++m) to[m] += strip * kBytes<type>;
        }
        if (rest) up_tile<type, false>(inner, width, lasts, strip, 0, count, to, tokens, rest, 0);
    }
}

template <Element type>
void blocks(const RowLora& a, std::int64_t first, std::int64_t last, char* scratch) {
    float* const floats = reinterpret_cast<float*>(scratch);
    const Space space{floats, floats + a.inner_floats(), floats + a.inner_floats() + kGroup * kRow};
    const float** pointers = reinterpret_cast<const float**>(space.factors + a.factor_floats());
    Places places;
    const RowLora::Group* group = a.groups;
    std::int64_t begin = 0;  // the group's first piece
    for (std::int64_t piece = first; piece < last; ++piece) {
        for (; piece >= group->last; ++group) begin = group->last;
        locate(a, *group, (piece - begin) * kBlock, places);
        const std::int64_t* units = group->units;
        const std::int64_t count = group->count(), width = count * kRank;
        down_block<type>(a, places, units, count, space);
        const float* inner = space.inner;
        for (std::int64_t part = 0; part < RowLora::most_parts; ++part) {
            const std::int64_t own = group->counts[part];
            if (own) up_block<type>(a, a.ys[part], places, units, own, inner, width, space.factors, pointers);
            units += own, inner += own * kRank;
        }
    }
}

}  // namespace lora

inline void row_lora(const RowLora& a, std::int64_t first, std::int64_t last, char* scratch) {
    STYLEFAST_BY_TYPE(a.type, lora::blocks, a, first, last, scratch)
}
