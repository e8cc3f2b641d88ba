// Stored fp8 times a scale of its channel. Included inside an unnamed namespace, after span_kernel.h.

template <Element type>
void dequantise_rows(const Dequantise& a, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        const char* codes = a.values.data + row * a.values.row;
        const float* scale = a.scale + row / a.tokens * a.channels;
        char* out = a.out.data + row * a.out.row;
        std::int64_t i = 0;
        for (; i + W <= a.channels; i += W) {
            const Floats x = Vector::mul(Vector::load_as<Element::f8>(codes, i, W), Vector::load(scale + i));
            Vector::store_as<type>(out + i * kBytes<type>, x);
        }
        if (i == a.channels) continue;
        const auto rest = static_cast<std::size_t>(a.channels - i);
        char last_codes[W] = {};
        alignas(64) float last_scale[W] = {};
        __builtin_memcpy(last_codes, codes + i, rest);
        __builtin_memcpy(last_scale, scale + i, 4 * rest);
        const Floats x = Vector::mul(Vector::load_as<Element::f8>(last_codes, 0, W), Vector::load(last_scale));
        store_rest<type>(out + i * kBytes<type>, a.channels - i, x);
    }
}

inline void dequantise(const Dequantise& a, std::int64_t first, std::int64_t last) {
    STYLEFAST_BY_TYPE(a.out.type, dequantise_rows, a, first, last)
}
