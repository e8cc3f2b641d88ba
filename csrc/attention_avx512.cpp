// The CPU kernels for AVX-512 F, DQ, BW and VL. No header that others share may come after the target: its
// inline functions would be compiled for these instructions and could be linked into code that runs on every machine.
#include "attention.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

namespace stylefast {
namespace {

#include "vector_avx512.h"
// the parts build on each other in this order
#include "tile_kernel.h"
#include "float_compute.h"
#include "shared_attention_kernel.h"
#include "gated_attention_kernel.h"

const Kernels kKernels = {
    L, shared_scratch, shared_unit<FloatCompute>, gated_scratch, gated_unit<FloatCompute>,
};

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace stylefast

#ifdef __clang__
#pragma clang attribute pop
#endif

#else

const stylefast::Kernels* stylefast::avx512_kernels() { return nullptr; }

#endif
