// AdaIN's gains and offsets. Included inside an unnamed namespace, after span_kernel.h.

STYLEFAST_INLINE float* channels_of(const Channels& x, std::int64_t tensor, std::int64_t row, std::int64_t head) {
    return x.data + tensor * x.tensor + row * x.row + head * x.head;
}

STYLEFAST_INLINE Floats load_channels(const float* x, std::int64_t c, std::int64_t d) {
    return load_from<Element::f32>(reinterpret_cast<const char*>(x), c, d);
}

STYLEFAST_INLINE void store_channels(float* x, std::int64_t c, std::int64_t d, Floats value) {
    store_to<Element::f32>(reinterpret_cast<char*>(x), c, d, value);
}

inline void adain_affine(const AdainAffine& a, std::int64_t first, std::int64_t last) {
    const Floats eps = Vector::all(1e-5f), one = Vector::all(1.0f);
    for (std::int64_t piece = first; piece < last; ++piece) {
        const std::int64_t head = piece % a.heads, row = piece / a.heads % a.rows, part = piece / a.heads / a.rows;
        float* gain = channels_of(a.gain, part, row, head);
        float* offset = channels_of(a.offset, part, row, head);
        const std::int64_t page = a.page[row];
        const float strength = a.strength[row * a.parts + part];
        if (page < 0 || strength == 0.0f) {
            for (std::int64_t c = 0; c < a.d; c += W) {
                store_channels(gain, c, a.d, one);
                store_channels(offset, c, a.d, Vector::zero());
            }
            continue;
        }
        const bool live = page < a.rows;
        const std::int64_t source = live ? page : page - a.rows;
        const float* mean = channels_of(a.mean, part, row, head);
        const float* variance = channels_of(a.variance, part, row, head);
        const float* page_mean = channels_of(live ? a.mean : a.pool_mean, part, source, head);
        const float* page_variance = channels_of(live ? a.variance : a.pool_variance, part, source, head);
        const Floats s = Vector::all(strength);
        for (std::int64_t c = 0; c < a.d; c += W) {
            const Floats wanted = Vector::add(load_channels(page_variance, c, a.d), eps);
            const Floats ratio = Vector::sqrt(Vector::div(wanted, Vector::add(load_channels(variance, c, a.d), eps)));
            const Floats moved = Vector::mul(ratio, load_channels(mean, c, a.d));
            store_channels(gain, c, a.d, Vector::fma(s, Vector::sub(ratio, one), one));
            store_channels(offset, c, a.d, Vector::mul(s, Vector::sub(load_channels(page_mean, c, a.d), moved)));
        }
    }
}
