// The CPU attention kernels for bf16 on AVX512-BF16, whose products take two numbers a lane. What attention_avx512.cpp
// says about headers holds here too.
#include "attention.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

namespace stylefast {
namespace {

#include "vector_avx512.h"
// the parts build on each other in this order
#include "tile_kernel.h"

// words that are two bf16
struct PairCompute {
    static constexpr int values = 2;

    static STYLEFAST_INLINE __m512bh halves(Floats x) { return reinterpret_cast<__m512bh>(x); }

    static STYLEFAST_INLINE Floats step(Floats sum, Floats left, Floats right) {
        return _mm512_dpbf16_ps(sum, halves(left), halves(right));
    }

    // low 0 .. 15, high 0 .. 15 as 32 numbers in a row
    static STYLEFAST_INLINE Floats adjacent(Floats low, Floats high) {
        return reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(high, low));
    }

    // low 0, high 0, low 1, high 1, ...
    static STYLEFAST_INLINE Floats pair(Floats low, Floats high) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i row = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, row));
    }

    // 2^x on [0, 1) to 8.6e-5, a 23rd of what rounding the weight to bf16 costs; exactly 1 at 0
    struct Exp2 {
        static STYLEFAST_INLINE Floats at(Floats x) {
            Floats y = Vector::fma(Vector::all(0.077067042f), x, Vector::all(0.2276449912f));
            y = Vector::fma(y, x, Vector::all(0.6951167864f));
            return Vector::fma(y, x, Vector::all(1.0f));
        }
    };
};

#include "gated_attention_kernel.h"
#include "shared_attention_kernel.h"

const Kernels kKernels = {
    L, shared_scratch, shared_unit<PairCompute>, gated_scratch, gated_unit<PairCompute>,
};

}  // namespace

const Kernels* avx512_bf16_kernels() { return &kKernels; }

}  // namespace stylefast

#ifdef __clang__
#pragma clang attribute pop
#endif

#else

const stylefast::Kernels* stylefast::avx512_bf16_kernels() { return nullptr; }

#endif
