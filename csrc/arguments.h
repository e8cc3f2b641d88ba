// Turns tensors into the views that kernels take. What no kernel can take is a std::invalid_argument that names it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "views.h"

namespace stylefast {

using OptionalTensor = std::optional<at::Tensor>;

[[noreturn]] void refuse(const std::string& message);

// low <= value < end
void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t end);
// the same for every value of contiguous int64
void check_range(const char* name, const at::Tensor& values, std::int64_t low, std::int64_t end);
void check_sizes(const char* name, const at::Tensor& x, at::IntArrayRef sizes);

const at::Tensor& need(const char* name, const OptionalTensor& x);
Element element_of(const char* name, const at::Tensor& x);

// [rows, tokens, heads, d]
Tokens tokens_of(const char* name, const at::Tensor& x);
Tokens tokens_like(const char* name, const at::Tensor& x, at::IntArrayRef sizes, const Tokens& like);

at::Tensor contiguous(const char* name, const at::Tensor& x, at::ScalarType type, at::IntArrayRef sizes);

// fp32, `dims` dimensions, channels side by side; a copy where they are not
at::Tensor channels_side_by_side(const char* name, const at::Tensor& x, std::int64_t dims);
// x [n, rows, heads, d] or [rows, heads, d], from channels_side_by_side
Channels channels_of(const at::Tensor& x);

}  // namespace stylefast
