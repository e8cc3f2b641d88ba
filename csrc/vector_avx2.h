// Eight fp32 lanes of AVX2, FMA and F16C. Included inside an unnamed namespace.
#define STYLEFAST_INLINE inline __attribute__((always_inline))

struct Vector {
    using Floats = __m256;
    using Doubles = __m256d;
    static constexpr int lanes = 8;
    static constexpr int group_vectors = 2;  // with 6 block rows: 12 sums, 2 operands and 1 broadcast in 16 registers
    static constexpr int block_rows = 6;

    static STYLEFAST_INLINE Floats zero() { return _mm256_setzero_ps(); }
    static STYLEFAST_INLINE Floats all(float x) { return _mm256_set1_ps(x); }
    static STYLEFAST_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static STYLEFAST_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static STYLEFAST_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static STYLEFAST_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // b where either is NaN
    static STYLEFAST_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static STYLEFAST_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static STYLEFAST_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }

    // the first `count` lanes, the others 0; channels come in eights, so it is all or nothing here
    static STYLEFAST_INLINE Floats load(const void* from, std::int64_t count) {
        return count > 0 ? _mm256_loadu_ps(static_cast<const float*>(from)) : zero();
    }
    static STYLEFAST_INLINE void store(float* to, Floats x, std::int64_t count) {
        if (count > 0) _mm256_storeu_ps(to, x);
    }

    // 1 / x, and 0 for x = 0
    static STYLEFAST_INLINE Floats inverse_or_zero(Floats x) {
        const Floats nonzero = _mm256_cmp_ps(x, zero(), _CMP_NEQ_UQ);
        return _mm256_and_ps(_mm256_div_ps(all(1.0f), x), nonzero);
    }

    // 2^x: 0 below -126, NaN of NaN; x <= 0 in all uses
    template <class Polynomial>
    static STYLEFAST_INLINE Floats exp2(Floats x) {
        const Floats in_range = _mm256_cmp_ps(x, all(-126.0f), _CMP_NLT_UQ);
        x = _mm256_max_ps(all(-126.0f), x);
        const Floats whole = _mm256_floor_ps(x);
        const Floats mantissa = Polynomial::at(sub(x, whole));
        const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(mantissa), exponent);
        return _mm256_and_ps(_mm256_castsi256_ps(scaled), in_range);
    }

    static STYLEFAST_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static STYLEFAST_INLINE Floats sqrt(Floats x) { return _mm256_sqrt_ps(x); }
    static STYLEFAST_INLINE Floats magnitude(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
    // `yes` where the sign bit of x is set
    static STYLEFAST_INLINE Floats where_negative(Floats x, Floats yes, Floats no) {
        return _mm256_blendv_ps(no, yes, x);
    }

    static STYLEFAST_INLINE Doubles all_doubles(double x) { return _mm256_set1_pd(x); }
    static STYLEFAST_INLINE Doubles low(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
    static STYLEFAST_INLINE Doubles high(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
    static STYLEFAST_INLINE Floats narrow(Doubles low, Doubles high) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
    }
    static STYLEFAST_INLINE Doubles add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
    static STYLEFAST_INLINE Doubles sub(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
    static STYLEFAST_INLINE Doubles mul(Doubles a, Doubles b) { return _mm256_mul_pd(a, b); }
    static STYLEFAST_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
    static STYLEFAST_INLINE double total(Doubles x) {
        const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
        return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
    }

    // all lanes, of fp32, bf16 or fp16
    template <Element type>
    static STYLEFAST_INLINE Floats load_as(const char* from) {
        return load_as<type>(from, 0, lanes);
    }
    template <Element type>
    static STYLEFAST_INLINE void store_as(char* to, Floats x) {
        store_as<type>(to, 0, lanes, x);
    }

    template <Element type>
    static STYLEFAST_INLINE Floats load_as(const char* row, std::int64_t first, std::int64_t count) {
        if (count <= 0) return zero();
        if constexpr (type == Element::f32) {
            return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + first);
        } else if constexpr (type == Element::bf16) {
            const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * first));
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        } else if constexpr (type == Element::f16) {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * first)));
        } else {
            // e4m3 moved up by 7 bits is a half whose exponent bias is 8 too high
            const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + first)));
            const __m128i size = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
            const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
            const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
            const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(size, 7), sign), nan);
            return mul(_mm256_cvtph_ps(half), all(256.0f));
        }
    }

    template <Element type>
    static STYLEFAST_INLINE void store_as(char* row, std::int64_t first, std::int64_t count, Floats x) {
        if (count <= 0) return;
        if constexpr (type == Element::f32) {
            _mm256_storeu_ps(reinterpret_cast<float*>(row) + first, x);
        } else if constexpr (type == Element::f16) {
            const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 2 * first), half);
        } else {
            const __m256i bits = _mm256_castps_si256(x);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
            const __m256 round = _mm256_blendv_ps(_mm256_castsi256_ps(even), _mm256_set1_ps(__builtin_nanf("")), nan);
            const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round), 16);
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 2 * first), _mm256_castsi256_si128(packed));
        }
    }

    static STYLEFAST_INLINE void transpose(Floats (&x)[8]) {
        Floats y[8];
        for (int i = 0; i < 8; i += 2) {
            y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
            x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
            x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
            x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
            y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
        }
        for (int i = 0; i < 8; ++i) x[i] = y[i];
    }
};
