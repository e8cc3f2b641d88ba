// What the CPU kernels of the attention operations take.
#pragma once

#include "views.h"

namespace stylefast {

// One unit of work is `chunk` queries of one (row, head); units = rows * heads * ceil(tokens / chunk).
struct SharedAttention {
    std::int64_t rows, tokens, heads, d, chunk;
    Tokens q, k, v, out;
    std::int64_t references;     // pages a row may read
    const std::int64_t* page;    // [rows, references]
    const std::int64_t* mode;    // [rows]: 0 plain, 1 concat, 2 swap
    const float *scale, *shift;  // [rows, references]
    Channels gain, offset;       // n = moved: q and k, or q, k and v; data is null without AdaIN
    std::int64_t moved;
    std::int64_t pages, page_tokens;
    Tokens pool_k, pool_v;
    Channels pool_k_scale, pool_v_scale;  // n = 1; data is null unless the pool is fp8
    const float* bias;                    // [rows + pages, tokens], null without
    std::int64_t bias_row;
};

// Units as above. A segment is one image page with its strength; those of equal group share a softmax.
struct GatedCrossAttention {
    std::int64_t rows, tokens, heads, d, chunk;
    Tokens q, out;
    std::int64_t text_tokens;
    Tokens text_k, text_v;
    const std::int64_t* text_page;     // [rows]
    const std::int64_t* text_lengths;  // [text pages]; null: every page has text_tokens
    std::int64_t segments;
    Tokens image_k, image_v;
    const std::int64_t* image_lengths;  // [image pages]
    const std::int64_t* image_page;     // [rows, segments]; -1 none
    const float* strength;              // [rows, segments]
    const std::int64_t* group;          // [rows, segments]
    const float* masks;                 // [masks, tokens], null without
    std::int64_t mask_row;
    const std::int64_t* mask_index;  // [rows, segments], -1 everywhere; null without masks
};

// The kernels of one instruction set. `scratch` is 64-byte aligned and belongs to the calling thread.
struct Kernels {
    std::int64_t lanes;  // queries that move together; `chunk` is a multiple of it
    std::size_t (*shared_scratch)(const SharedAttention&);
    void (*shared_unit)(const SharedAttention&, std::int64_t unit, char* scratch);
    std::size_t (*gated_scratch)(const GatedCrossAttention&);
    void (*gated_unit)(const GatedCrossAttention&, std::int64_t unit, char* scratch);
};

// null where the compiler had no x86-64 target; the last serves bf16 only
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace stylefast
