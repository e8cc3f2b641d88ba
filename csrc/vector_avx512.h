// Sixteen fp32 lanes of AVX-512 F, DQ, BW and VL. Included inside an unnamed namespace.
#define STYLEFAST_INLINE inline __attribute__((always_inline))

struct Vector {
    using Floats = __m512;
    using Doubles = __m512d;
    static constexpr int lanes = 16;
    static constexpr int group_vectors = 4;  // with 6 block rows: 24 sums, 4 operands and 1 broadcast in 32 registers
    static constexpr int block_rows = 6;

    static STYLEFAST_INLINE __mmask16 first_lanes(std::int64_t count) {
        return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
    }

    static STYLEFAST_INLINE Floats zero() { return _mm512_setzero_ps(); }
    static STYLEFAST_INLINE Floats all(float x) { return _mm512_set1_ps(x); }
    static STYLEFAST_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static STYLEFAST_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static STYLEFAST_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static STYLEFAST_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // b where either is NaN
    static STYLEFAST_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static STYLEFAST_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static STYLEFAST_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

    // the first `count` lanes, the others 0
    static STYLEFAST_INLINE Floats load(const void* from, std::int64_t count) {
        return _mm512_maskz_loadu_ps(first_lanes(count), from);
    }
    static STYLEFAST_INLINE void store(float* to, Floats x, std::int64_t count) {
        _mm512_mask_storeu_ps(to, first_lanes(count), x);
    }

    // 1 / x, and 0 for x = 0
    static STYLEFAST_INLINE Floats inverse_or_zero(Floats x) {
        return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_UQ), all(1.0f), x);
    }

    // 2^x: 0 of -inf, NaN of NaN; reduce is x - floor(x), and 0 of -inf, where scalef gives 0 whatever the mantissa
    template <class Polynomial>
    static STYLEFAST_INLINE Floats exp2(Floats x) {
        return _mm512_scalef_ps(Polynomial::at(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF)), x);
    }

    static STYLEFAST_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static STYLEFAST_INLINE Floats sqrt(Floats x) { return _mm512_sqrt_ps(x); }
    static STYLEFAST_INLINE Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
    // `yes` where the sign bit of x is set
    static STYLEFAST_INLINE Floats where_negative(Floats x, Floats yes, Floats no) {
        return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(_mm512_castps_si512(x)), yes);
    }

    static STYLEFAST_INLINE Doubles all_doubles(double x) { return _mm512_set1_pd(x); }
    static STYLEFAST_INLINE Doubles low(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
    static STYLEFAST_INLINE Doubles high(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
    static STYLEFAST_INLINE Floats narrow(Doubles low, Doubles high) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
    }
    static STYLEFAST_INLINE Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
    static STYLEFAST_INLINE Doubles sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
    static STYLEFAST_INLINE Doubles mul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }
    static STYLEFAST_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
    static STYLEFAST_INLINE double total(Doubles x) { return _mm512_reduce_add_pd(x); }

    // all lanes, of fp32, bf16 or fp16
    template <Element type>
    static STYLEFAST_INLINE Floats load_as(const char* from) {
        if constexpr (type == Element::f32) {
            return _mm512_loadu_ps(from);
        } else {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            if constexpr (type == Element::f16) return _mm512_cvtph_ps(bits);
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
    }

    template <Element type>
    static STYLEFAST_INLINE Floats load_as(const char* row, std::int64_t first, std::int64_t count) {
        const __mmask16 mask = first_lanes(count);
        if constexpr (type == Element::f32) {
            return _mm512_maskz_loadu_ps(mask, row + 4 * first);
        } else if constexpr (type == Element::bf16) {
            const __m256i bits = _mm256_maskz_loadu_epi16(mask, row + 2 * first);
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else if constexpr (type == Element::f16) {
            return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + 2 * first));
        } else {
            // e4m3 moved up by 7 bits is a half whose exponent bias is 8 too high
            const __m256i bits = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, row + first));
            const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
            const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
            const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
            const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), nan);
            return mul(_mm512_cvtph_ps(half), all(256.0f));
        }
    }

    template <Element type>
    static STYLEFAST_INLINE void store_as(char* row, std::int64_t first, std::int64_t count, Floats x) {
        const __mmask16 mask = first_lanes(count);
        if constexpr (type == Element::f32) {
            _mm512_mask_storeu_ps(row + 4 * first, mask, x);
        } else if constexpr (type == Element::f16) {
            _mm256_mask_storeu_epi16(row + 2 * first, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        } else {
            _mm256_mask_storeu_epi16(row + 2 * first, mask, rounded_to_bf16(x));
        }
    }

    // all lanes, as fp32, bf16 or fp16
    template <Element type>
    static STYLEFAST_INLINE void store_as(char* to, Floats x) {
        if constexpr (type == Element::f32) {
            _mm512_storeu_ps(to, x);
        } else {
            __m256i* place = reinterpret_cast<__m256i*>(to);
            if constexpr (type == Element::f16) {
                _mm256_storeu_si256(place, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
            } else {
                _mm256_storeu_si256(place, rounded_to_bf16(x));
            }
        }
    }

    static STYLEFAST_INLINE __m256i rounded_to_bf16(Floats x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i round = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round, 16));
    }

    static STYLEFAST_INLINE void transpose(Floats (&x)[16]) {
        Floats y[16];
        for (int i = 0; i < 16; i += 2) {
            y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
            x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
            x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
            x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
        }
        // x[4 j + i] holds column 4 b + i of rows 4 j .. 4 j + 3 in its 128-bit block b
        for (int i = 0; i < 4; ++i) {
            const Floats low0 = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x44);
            const Floats high0 = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee);
            const Floats low1 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x44);
            const Floats high1 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xee);
            y[i] = _mm512_shuffle_f32x4(low0, low1, 0x88);
            y[i + 4] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
            y[i + 8] = _mm512_shuffle_f32x4(high0, high1, 0x88);
            y[i + 12] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
        }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
};
