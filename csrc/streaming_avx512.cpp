// The CPU kernels of the operations bound by memory, for AVX-512 F, DQ, BW and VL. What attention_avx2.cpp says about
// headers holds here too.
#include "streaming.h"

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
// the others build on these two
#include "span_kernel.h"
#include "adain_affine_kernel.h"
#include "dequantise_kernel.h"
#include "geglu_kernel.h"
#include "group_norm_kernel.h"
#include "guided_step_kernel.h"
#include "layer_norm_kernel.h"
#include "row_lora_kernel.h"
#include "token_stats_kernel.h"

const StreamingKernels kKernels = {
    token_stats,   adain_affine,   dequantise, geglu,          layer_norm,  block_moments,
    group_moments, channel_tables, normalise,  output_moments, guided_step, row_lora,
};

}  // namespace

const StreamingKernels* avx512_streaming() { return &kKernels; }

}  // namespace stylefast

#ifdef __clang__
#pragma clang attribute pop
#endif

#else

const stylefast::StreamingKernels* stylefast::avx512_streaming() { return nullptr; }

#endif
