// What the CPU kernels of the operations bound by memory take; their formulas stand in kernels/.
#pragma once

#include "views.h"

namespace stylefast {

// A piece is one (tensor, row, head).
struct TokenStats {
    std::int64_t count, rows, tokens, heads, d;
    Tokens x[3];
    Channels mean, variance;
};

// A piece is one (part, row, head).
struct AdainAffine {
    std::int64_t parts, rows, heads, d;
    Channels mean, variance, pool_mean, pool_variance, gain, offset;
    const std::int64_t* page;  // [rows]: a row p < rows, pool entry p - rows, or -1
    const float* strength;     // [rows, parts]
};

// A piece is one row of [groups * tokens, channels]: values are fp8, scale [groups, channels].
struct Dequantise {
    std::int64_t tokens, channels;
    Lines values, out;
    const float* scale;
};

// A piece is one row: x [rows, 2 inner], out [rows, inner].
struct Geglu {
    std::int64_t inner;
    Lines x, out;
};

// Rows with the same units are a group: one product whose tokens are those of all its rows. A piece is one (group,
// block of its tokens). Tokens are pixels of the output; a linear layer has one line of them.
struct RowLora {
    static constexpr std::int64_t rank = 16, most_parts = 3;
    static constexpr std::int64_t block = 96;                // tokens
    static constexpr std::int64_t chunk = 256;               // channels summed at once, so that chains stay short
    static constexpr std::int64_t group = 12;                // tokens packed at once, at most
    static constexpr std::int64_t packed = 1280;             // channels of them, in one run through memory
    static constexpr std::int64_t packed_row = packed + 16;  // floats to the next: not all in the same cache sets

    // [rows, lines, pixels, channels]; strides in bytes, channels side by side
    struct Pixels {
        char* data;
        std::int64_t row, line, pixel;
    };
    struct Row {
        std::int64_t number;
        const float* scales;  // of its group's units
    };
    struct Group {
        const std::int64_t* units;  // part after part, in the order in which they are summed
        std::int64_t counts[most_parts];
        const Row* rows;
        std::int64_t members;  // the number of its rows
        std::int64_t last;     // the piece after its last one

        std::int64_t count() const { return counts[0] + counts[1] + counts[2]; }
    };

    Element type;  // of x, ys, down and up
    std::int64_t in, out, height, width, x_height, x_width, side, stride, padding;
    Pixels x, ys[most_parts];
    const char *down, *up;            // [units, side * side, in, rank], [units, rank, out]
    const Group* groups;              // of rows that have units with a scale other than 0
    std::int64_t most, most_of_part;  // units of a group, and of one of its parts

    std::int64_t inner_floats() const { return block * most * rank; }
    // one of the factors at a time, as fp32: chunks of A, or B and its last columns
    std::int64_t factor_floats() const {
        const std::int64_t a = most * packed * rank, b = most_of_part * rank * (out + 64);
        return type == Element::f32 ? most_of_part * rank * 64 : (a > b ? a : b);
    }
    std::int64_t scratch() const {
        return 4 * (inner_floats() + group * packed_row + factor_floats()) + 16 * most_of_part;
    }
};

// A piece is one row of channels; weight and bias have x's type.
struct LayerNorm {
    std::int64_t channels;
    Lines x, residual, total, out;  // residual and total without data: the norm alone
    const char *weight, *bias;
    double eps;
};

// Group norm in four steps; all threads end one before the next begins. Blocks partition a group's elements, or all
// channels' positions in the channels-last layout, by the shape alone, so that results don't depend on threads.
struct GroupNorm {
    std::int64_t rows, channels, positions, groups;
    bool channels_last, silu;
    double eps;
    Lines x, out;
    const char *weight, *bias;               // of x's type
    const std::int64_t* page;                // [rows] as in AdainAffine, null without
    const float *pool_mean, *pool_variance;  // [pages, groups], groups side by side
    std::int64_t pool_mean_page, pool_variance_page;
    double pool_elements;
    std::int64_t block, blocks;  // elements or positions in a block; blocks in a row
    double* block_mean;          // [rows, blocks, groups], as are the squared distances from it
    double* block_squares;
    double* mean;  // [rows, groups]
    double* variance;
    float* table;  // [rows, 3, channels]: out = (x - table[0]) * table[1] + table[2]
};

// A piece is one (picture, block).
struct GuidedStep {
    static constexpr std::int64_t block = 1024;  // numbers
    static constexpr std::int64_t branches = 4, full = 3, terms = 6;
    std::int64_t pictures, numbers, blocks;                    // numbers of a picture and the blocks they make
    Lines latents, anchor, noise, predictions, newest, older;  // the two of history
    Lines next_latents, next_anchor, next_newest, next_older;
    const std::int64_t* branch_rows;                  // [pictures, branches]; -1 none
    const float *branch_weights, *denoised, *update;  // [pictures, branches], [pictures, 2], [pictures, 2, terms]
    const float* factor;                              // [pictures], on the output

    // mean and squared distances from it of every block, of the output and of the full branch: [pictures, blocks, 4]
    const bool* rescaled;  // [pictures]
    double* moments;
};

// Every function works through pieces first .. last.
struct StreamingKernels {
    void (*token_stats)(const TokenStats&, std::int64_t first, std::int64_t last);
    void (*adain_affine)(const AdainAffine&, std::int64_t first, std::int64_t last);
    void (*dequantise)(const Dequantise&, std::int64_t first, std::int64_t last);
    void (*geglu)(const Geglu&, std::int64_t first, std::int64_t last);
    void (*layer_norm)(const LayerNorm&, std::int64_t first, std::int64_t last);
    // pieces: (row, block, group), or (row, block) channels last, with scratch for `channels_scratch(a)` bytes
    void (*block_moments)(const GroupNorm&, std::int64_t first, std::int64_t last, char* scratch);
    // pieces: rows
    void (*group_moments)(const GroupNorm&, std::int64_t first, std::int64_t last);
    void (*channel_tables)(const GroupNorm&, std::int64_t first, std::int64_t last);
    // pieces: (row, channel), or (row, position) channels last
    void (*normalise)(const GroupNorm&, std::int64_t first, std::int64_t last);
    void (*output_moments)(const GuidedStep&, std::int64_t first, std::int64_t last);
    void (*guided_step)(const GuidedStep&, std::int64_t first, std::int64_t last);
    void (*row_lora)(const RowLora&, std::int64_t first, std::int64_t last, char* scratch);
};

// bytes of scratch, 64-byte aligned, that `block_moments` wants channels last: three arrays of whole vectors
inline std::int64_t channels_scratch(const GroupNorm& a) { return 3 * 4 * ((a.channels + 15) / 16 * 16); }

// null where the compiler had no x86-64 target
const StreamingKernels* avx2_streaming();
const StreamingKernels* avx512_streaming();

}  // namespace stylefast
