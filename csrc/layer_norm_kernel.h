// Layer norm of rows that stay in L1, alone or behind a residual sum. Included inside an unnamed namespace, after
// span_kernel.h.

// to = x + residual, rounded; about the mean of it
template <Element type>
STYLEFAST_INLINE float add_rows(const char* x, const char* residual, std::int64_t channels, char* to) {
    Floats sum = Vector::zero();
    for (std::int64_t c = 0; c < channels; c += W) {
        const Floats value = Vector::add(load_from<type>(x, c, channels), load_from<type>(residual, c, channels));
        store_to<type>(to, c, channels, value);
        sum = Vector::add(sum, value);
    }
    return static_cast<float>(Wide::of(sum).total() / static_cast<double>(channels));
}

template <Element type>
void layer_norm_rows(const LayerNorm& a, std::int64_t first, std::int64_t last) {
    const std::int64_t channels = a.channels;
    for (std::int64_t row = first; row < last; ++row) {
        const char* x = a.x.data + row * a.x.row;
        Moments moments;
        if (a.residual.data) {
            char* total = a.total.data + row * a.total.row;
            const float centre = add_rows<type>(x, a.residual.data + row * a.residual.row, channels, total);
            moments = moments_about<type>(total, channels, centre);
            x = total;
        } else {
            moments = span_moments<type>(x, channels);
        }
        const double deviation = __builtin_sqrt(moments.squares / static_cast<double>(channels) + a.eps);
        const float near = static_cast<float>(moments.mean);
        const Floats mean = Vector::all(near);
        const Floats slip = Vector::all(static_cast<float>(moments.mean - static_cast<double>(near)));
        const Floats inverse = Vector::all(static_cast<float>(1.0 / deviation));
        char* out = a.out.data + row * a.out.row;
        for (std::int64_t c = 0; c < channels; c += W) {
            const Floats away = Vector::sub(Vector::sub(load_from<type>(x, c, channels), mean), slip);
            const Floats y = Vector::fma(Vector::mul(away, inverse), load_from<type>(a.weight, c, channels),
                                         load_from<type>(a.bias, c, channels));
            store_to<type>(out, c, channels, y);
        }
    }
}

inline void layer_norm(const LayerNorm& a, std::int64_t first, std::int64_t last) {
    STYLEFAST_BY_TYPE(a.x.type, layer_norm_rows, a, first, last)
}
