// Group norm and SiLU in four steps: moments of blocks, of groups, a table for every channel, the norm itself. Included
// inside an unnamed namespace, after adain_affine_kernel.h.

// one block of one group whose elements lie side by side; moments go to [row, block, group]
template <Element type>
void contiguous_block(const GroupNorm& a, std::int64_t piece) {
    const std::int64_t group = piece % a.groups, block = piece / a.groups % a.blocks, row = piece / a.groups / a.blocks;
    const std::int64_t elements = a.channels / a.groups * a.positions, first = block * a.block;
    const char* x = a.x.data + row * a.x.row + (group * elements + first) * kBytes<type>;
    const Moments moments = span_moments<type>(x, least(a.block, elements - first));
    a.block_mean[piece] = moments.mean;
    a.block_squares[piece] = moments.squares;
}

// All channels of one block of positions. First every channel's mean, roughly; then the distances from it and their
// squares, in fp32 over this few positions; then the groups in double.
template <Element type>
void channels_last_block(const GroupNorm& a, std::int64_t piece, char* scratch) {
    const std::int64_t block = piece % a.blocks, row = piece / a.blocks, channels = a.channels;
    const std::int64_t first = block * a.block, count = least(a.block, a.positions - first);
    const std::int64_t step = channels * kBytes<type>;
    const char* x = a.x.data + row * a.x.row + first * step;
    const std::int64_t width = (channels + W - 1) / W * W;
    float* const centre = reinterpret_cast<float*>(scratch);
    float* const slip = centre + width;
    float* const squares = slip + width;
    for (std::int64_t c = 0; c < width; c += W) {
        Vector::store(centre + c, Vector::zero());
        Vector::store(slip + c, Vector::zero());
        Vector::store(squares + c, Vector::zero());
    }

    std::int64_t p = 0;
    for (; p + 4 <= count; p += 4) {
        const char *one = x + p * step, *two = one + step, *three = two + step, *four = three + step;
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats sum = sum_of_four(load_from<type>(one, c, channels), load_from<type>(two, c, channels),
                                           load_from<type>(three, c, channels), load_from<type>(four, c, channels));
            Vector::store(centre + c, Vector::add(Vector::load(centre + c), sum));
        }
    }
    for (; p < count; ++p) {
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats value = load_from<type>(x + p * step, c, channels);
            Vector::store(centre + c, Vector::add(Vector::load(centre + c), value));
        }
    }
    const Floats inverse = Vector::all(1.0f / static_cast<float>(count));
    for (std::int64_t c = 0; c < width; c += W) {
        Vector::store(centre + c, Vector::mul(Vector::load(centre + c), inverse));
    }

    for (p = 0; p + 4 <= count; p += 4) {
        const char *one = x + p * step, *two = one + step, *three = two + step, *four = three + step;
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats from = Vector::load(centre + c);
            const Floats d0 = Vector::sub(load_from<type>(one, c, channels), from);
            const Floats d1 = Vector::sub(load_from<type>(two, c, channels), from);
            const Floats d2 = Vector::sub(load_from<type>(three, c, channels), from);
            const Floats d3 = Vector::sub(load_from<type>(four, c, channels), from);
            Vector::store(slip + c, Vector::add(Vector::load(slip + c), sum_of_four(d0, d1, d2, d3)));
            Vector::store(squares + c, Vector::add(Vector::load(squares + c), squares_of_four(d0, d1, d2, d3)));
        }
    }
    for (; p < count; ++p) {
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats away = Vector::sub(load_from<type>(x + p * step, c, channels), Vector::load(centre + c));
            Vector::store(slip + c, Vector::add(Vector::load(slip + c), away));
            Vector::store(squares + c, Vector::fma(away, away, Vector::load(squares + c)));
        }
    }

    const std::int64_t width_of_group = channels / a.groups;
    const double number = static_cast<double>(count), part = 1.0 / number;
    for (std::int64_t group = 0; group < a.groups; ++group) {
        const std::int64_t begin = group * width_of_group, end = begin + width_of_group;
        double mean = 0.0, distance = 0.0;
        for (std::int64_t c = begin; c < end; ++c) mean += centre[c] + slip[c] * part;
        mean /= static_cast<double>(width_of_group);
        for (std::int64_t c = begin; c < end; ++c) {
            const double own = slip[c] * part, away = centre[c] + own - mean, within = squares[c] - number * own * own;
            distance += (within < 0.0 ? 0.0 : within) + number * away * away;
        }
        a.block_mean[piece * a.groups + group] = mean;
        a.block_squares[piece * a.groups + group] = distance;
    }
}

inline void block_moments(const GroupNorm& a, std::int64_t first, std::int64_t last, char* scratch) {
    for (std::int64_t piece = first; piece < last; ++piece) {
        if (a.channels_last) {
            STYLEFAST_BY_TYPE(a.x.type, channels_last_block, a, piece, scratch)
        } else {
            STYLEFAST_BY_TYPE(a.x.type, contiguous_block, a, piece)
        }
    }
}

// mean and biased variance of every group of some rows
inline void group_moments(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    const std::int64_t width = a.channels / a.groups;
    const std::int64_t total = a.channels_last ? a.positions : width * a.positions;
    const double share = a.channels_last ? static_cast<double>(width) : 1.0;  // numbers per unit of a block
    const double inverse = 1.0 / static_cast<double>(width * a.positions);
    for (std::int64_t row = first; row < last; ++row) {
        const double* block_mean = a.block_mean + row * a.blocks * a.groups;
        const double* block_squares = a.block_squares + row * a.blocks * a.groups;
        double* mean = a.mean + row * a.groups;
        double* variance = a.variance + row * a.groups;
        for (std::int64_t g = 0; g < a.groups; ++g) mean[g] = variance[g] = 0.0;
        for (std::int64_t block = 0; block < a.blocks; ++block) {
            const double number = share * static_cast<double>(least(a.block, total - block * a.block));
            for (std::int64_t g = 0; g < a.groups; ++g) mean[g] += number * block_mean[block * a.groups + g];
        }
        for (std::int64_t g = 0; g < a.groups; ++g) mean[g] *= inverse;
        for (std::int64_t block = 0; block < a.blocks; ++block) {
            const double number = share * static_cast<double>(least(a.block, total - block * a.block));
            for (std::int64_t g = 0; g < a.groups; ++g) {
                const double away = block_mean[block * a.groups + g] - mean[g];
                variance[g] += block_squares[block * a.groups + g] + number * away * away;
            }
        }
        for (std::int64_t g = 0; g < a.groups; ++g) variance[g] *= inverse;
    }
}

// a group's mean and variance together with those of its row's page
STYLEFAST_INLINE Moments pooled(const GroupNorm& a, std::int64_t row, std::int64_t group) {
    const Moments own = {a.mean[row * a.groups + group], a.variance[row * a.groups + group]};
    const std::int64_t page = a.page ? a.page[row] : -1;
    if (page < 0) return own;
    const bool live = page < a.rows;
    const std::int64_t here = page * a.groups + group, entry = page - a.rows;
    // a row's own statistics are rounded as a bank stores them, so that a baked reference and a live one give equal
    // bits
    const float other_mean = live ? static_cast<float>(a.mean[here]) : a.pool_mean[entry * a.pool_mean_page + group];
    const float other_variance =
        live ? static_cast<float>(a.variance[here]) : a.pool_variance[entry * a.pool_variance_page + group];
    const double elements = static_cast<double>(a.channels / a.groups * a.positions);
    const double share = elements / (elements + (live ? elements : a.pool_elements));
    const double mean = share * own.mean + (1.0 - share) * other_mean;
    const double away = own.mean - mean, other_away = other_mean - mean;
    return {mean, share * (own.squares + away * away) + (1.0 - share) * (other_variance + other_away * other_away)};
}

template <Element type>
void row_tables(const GroupNorm& a, std::int64_t row) {
    float* mean = a.table + row * 3 * a.channels;
    float* gain = mean + a.channels;
    float* offset = gain + a.channels;
    for (std::int64_t c = 0; c < a.channels; c += W) {
        store_channels(gain, c, a.channels, load_from<type>(a.weight, c, a.channels));
        store_channels(offset, c, a.channels, load_from<type>(a.bias, c, a.channels));
    }
    const std::int64_t width = a.channels / a.groups;
    for (std::int64_t group = 0; group < a.groups; ++group) {
        const Moments moments = pooled(a, row, group);
        const float inverse = static_cast<float>(1.0 / __builtin_sqrt(moments.squares + a.eps));
        const float near = static_cast<float>(moments.mean);
        const float slip = static_cast<float>(moments.mean - static_cast<double>(near));
        for (std::int64_t c = group * width; c < (group + 1) * width; ++c) {
            mean[c] = near;
            gain[c] *= inverse;
            offset[c] -= slip * gain[c];
        }
    }
}

inline void channel_tables(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        STYLEFAST_BY_TYPE(a.x.type, row_tables, a, row)
    }
}

template <bool with_silu>
STYLEFAST_INLINE Floats normalised(Floats x, Floats mean, Floats gain, Floats offset) {
    const Floats y = Vector::fma(Vector::sub(x, mean), gain, offset);
    if constexpr (with_silu) return silu(y);
    return y;
}

template <Element type, bool with_silu>
void normalise_planes(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    const std::int64_t positions = a.positions, step = positions * kBytes<type>;
    for (std::int64_t plane = first; plane < last; ++plane) {
        const std::int64_t row = plane / a.channels, c = plane % a.channels;
        const float* table = a.table + row * 3 * a.channels + c;
        const Floats mean = Vector::all(table[0]), gain = Vector::all(table[a.channels]);
        const Floats offset = Vector::all(table[2 * a.channels]);
        const char* x = a.x.data + row * a.x.row + c * step;
        char* out = a.out.data + row * a.out.row + c * step;
        for (std::int64_t p = 0; p < positions; p += W) {
            const Floats y = normalised<with_silu>(load_from<type>(x, p, positions), mean, gain, offset);
            store_to<type>(out, p, positions, y);
        }
    }
}

template <Element type, bool with_silu>
void normalise_positions(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    const std::int64_t channels = a.channels, step = channels * kBytes<type>;
    for (std::int64_t position = first; position < last; ++position) {
        const std::int64_t row = position / a.positions, p = position % a.positions;
        const float* mean = a.table + row * 3 * channels;
        const float* gain = mean + channels;
        const float* offset = gain + channels;
        const char* x = a.x.data + row * a.x.row + p * step;
        char* out = a.out.data + row * a.out.row + p * step;
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats centre = load_channels(mean, c, channels), scale = load_channels(gain, c, channels);
            const Floats shift = load_channels(offset, c, channels);
            const Floats y = normalised<with_silu>(load_from<type>(x, c, channels), centre, scale, shift);
            store_to<type>(out, c, channels, y);
        }
    }
}

template <Element type>
void normalise_as(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    if (a.channels_last) {
        a.silu ? normalise_positions<type, true>(a, first, last) : normalise_positions<type, false>(a, first, last);
    } else {
        a.silu ? normalise_planes<type, true>(a, first, last) : normalise_planes<type, false>(a, first, last);
    }
}

inline void normalise(const GroupNorm& a, std::int64_t first, std::int64_t last) {
    STYLEFAST_BY_TYPE(a.x.type, normalise_as, a, first, last)
}
