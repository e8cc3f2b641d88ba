// GEGLU, row by row. Included inside an unnamed namespace, after span_kernel.h.

template <Element type>
void geglu_rows(const Geglu& a, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        const char* hidden = a.x.data + row * a.x.row;
        const char* gate = hidden + a.inner * kBytes<type>;
        char* out = a.out.data + row * a.out.row;
        for (std::int64_t i = 0; i < a.inner; i += W) {
            const Floats gated = gelu(load_from<type>(gate, i, a.inner));
            store_to<type>(out, i, a.inner, Vector::mul(load_from<type>(hidden, i, a.inner), gated));
        }
    }
}

inline void geglu(const Geglu& a, std::int64_t first, std::int64_t last) {
    STYLEFAST_BY_TYPE(a.x.type, geglu_rows, a, first, last)
}
