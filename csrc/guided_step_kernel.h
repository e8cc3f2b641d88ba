// The sampler step of every picture, block by block; a block's sums are fp32 and stay in L1. Included inside an unnamed
// namespace, after span_kernel.h.

// the numbers of one block of a picture, in whole vectors; what lies past the block's end is never stored
struct Block {
    alignas(64) float data[GuidedStep::block];

    STYLEFAST_INLINE Floats at(std::int64_t i) const { return Vector::load(data + i); }
    STYLEFAST_INLINE void put(std::int64_t i, Floats x) { Vector::store(data + i, x); }
    STYLEFAST_INLINE void clear() {
        for (std::int64_t i = 0; i < GuidedStep::block; i += W) put(i, Vector::zero());
    }
};

// where a block lies in its picture
struct Place {
    std::int64_t picture, first, count;
};

STYLEFAST_INLINE Place place_of(const GuidedStep& a, std::int64_t piece) {
    const std::int64_t first = piece % a.blocks * GuidedStep::block;
    return {piece / a.blocks, first, least(GuidedStep::block, a.numbers - first)};
}

STYLEFAST_INLINE char* numbers_of(const Lines& x, std::int64_t row, std::int64_t first) {
    return x.data + row * x.row + first * (x.type == Element::f32 ? 4 : 2);
}

// to += coefficient * x
template <Element type>
void add_as(const char* x, std::int64_t count, float coefficient, Block& to) {
    const Floats c = Vector::all(coefficient);
    for (std::int64_t i = 0; i < count; i += W) to.put(i, Vector::fma(c, load_from<type>(x, i, count), to.at(i)));
}

// the same into two sums; a coefficient of 0 leaves its sum alone whatever x holds
template <Element type>
void add_both_as(const char* x, std::int64_t count, float one, float two, Block& first, Block& second) {
    if (one == 0.0f) return two == 0.0f ? void() : add_as<type>(x, count, two, second);
    if (two == 0.0f) return add_as<type>(x, count, one, first);
    const Floats c = Vector::all(one), d = Vector::all(two);
    for (std::int64_t i = 0; i < count; i += W) {
        const Floats value = load_from<type>(x, i, count);
        first.put(i, Vector::fma(c, value, first.at(i)));
        second.put(i, Vector::fma(d, value, second.at(i)));
    }
}

template <Element type>
void store_as(const Block& from, std::int64_t count, char* to) {
    for (std::int64_t i = 0; i < count; i += W) store_to<type>(to, i, count, from.at(i));
}

// a block of line `row` of x times a coefficient, added to `to`
STYLEFAST_INLINE void add(const Lines& x, std::int64_t row, Place place, float coefficient, Block& to) {
    if (coefficient == 0.0f) return;
    STYLEFAST_BY_TYPE(x.type, add_as, numbers_of(x, row, place.first), place.count, coefficient, to)
}

STYLEFAST_INLINE void store(const Block& from, Place place, const Lines& to) {
    STYLEFAST_BY_TYPE(to.type, store_as, from, place.count, numbers_of(to, place.picture, place.first))
}

// sum of the branches, before rescale
inline void branch_sum(const GuidedStep& a, Place place, Block& output) {
    output.clear();
    for (std::int64_t branch = 0; branch < GuidedStep::branches; ++branch) {
        const std::int64_t i = place.picture * GuidedStep::branches + branch;
        if (a.branch_rows[i] >= 0) add(a.predictions, a.branch_rows[i], place, a.branch_weights[i], output);
    }
}

template <Element type>
void span_moments_into(const char* x, std::int64_t count, double* to) {
    const Moments moments = span_moments<type>(x, count);
    to[0] = moments.mean;
    to[1] = moments.squares;
}

inline void output_moments(const GuidedStep& a, std::int64_t first, std::int64_t last) {
    Block output;
    for (std::int64_t piece = first; piece < last; ++piece) {
        const Place place = place_of(a, piece);
        if (!a.rescaled[place.picture]) continue;
        branch_sum(a, place, output);
        double* to = a.moments + piece * 4;
        span_moments_into<Element::f32>(reinterpret_cast<const char*>(output.data), place.count, to);
        const std::int64_t full = a.branch_rows[place.picture * GuidedStep::branches + GuidedStep::full];
        const char* x = numbers_of(a.predictions, full, place.first);
        STYLEFAST_BY_TYPE(a.predictions.type, span_moments_into, x, place.count, to + 2)
    }
}

inline void guided_step(const GuidedStep& a, std::int64_t first, std::int64_t last) {
    Block output, x0, latents, anchor;
    for (std::int64_t piece = first; piece < last; ++piece) {
        const Place place = place_of(a, piece);
        const std::int64_t picture = place.picture;
        const float* denoised = a.denoised + picture * 2;
        x0.clear();
        add(a.latents, picture, place, denoised[0], x0);
        if (denoised[1] != 0.0f) {
            branch_sum(a, place, output);
            const Floats factor = Vector::all(a.factor[picture]), c = Vector::all(denoised[1]);
            for (std::int64_t i = 0; i < place.count; i += W) {
                x0.put(i, Vector::fma(c, Vector::mul(output.at(i), factor), x0.at(i)));
            }
        }

        const Lines block = {reinterpret_cast<char*>(x0.data), Element::f32, 0};
        const Lines terms[GuidedStep::terms] = {a.latents, a.anchor, block, a.newest, a.older, a.noise};
        const float* update = a.update + picture * 2 * GuidedStep::terms;
        latents.clear();
        anchor.clear();
        for (int term = 0; term < GuidedStep::terms; ++term) {
            const Lines& x = terms[term];
            const char* from = term == 2 ? x.data : numbers_of(x, picture, place.first);
            STYLEFAST_BY_TYPE(x.type, add_both_as, from, place.count, update[term], update[GuidedStep::terms + term],
                              latents, anchor)
        }
        store(latents, place, a.next_latents);
        store(anchor, place, a.next_anchor);
        store(x0, place, a.next_newest);
        const std::int64_t bytes = place.count * (a.newest.type == Element::f32 ? 4 : 2);
        __builtin_memcpy(numbers_of(a.next_older, picture, place.first), numbers_of(a.newest, picture, place.first),
                         static_cast<std::size_t>(bytes));
    }
}
