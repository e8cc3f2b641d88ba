// Tensors as the CPU kernels see them: raw pointers and strides, so that no file compiled for wide vectors sees a
// library header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stylefast {

enum class Element { f32, bf16, f16, f8 };

// [rows or pages, tokens, heads, d]; strides in bytes, channels side by side
struct Tokens {
    char* data = nullptr;
    Element type = Element::f32;
    std::int64_t row = 0, token = 0, head = 0;
};

// fp32 [n, rows or pages, heads, d]; strides in elements, channels side by side
struct Channels {
    float* data = nullptr;
    std::int64_t tensor = 0, row = 0, head = 0;
};

// [rows, ...]: all numbers of a row side by side; stride in bytes
struct Lines {
    char* data = nullptr;
    Element type = Element::f32;
    std::int64_t row = 0;
};

}  // namespace stylefast
