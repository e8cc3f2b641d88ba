// The CPU operations on tensors; their formulas stand in kernels/. `set` is what instruction_set() says. Every function
// fills its last arguments and throws std::invalid_argument for an index out of range or a tensor that its kernels
// can't take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace stylefast {

using OptionalTensor = std::optional<at::Tensor>;

void shared_attention(const std::string& set, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& page, const at::Tensor& mode, const at::Tensor& scale, const at::Tensor& shift,
                      const OptionalTensor& gain, const OptionalTensor& offset, const OptionalTensor& pool_k,
                      const OptionalTensor& pool_v, const OptionalTensor& pool_k_scale,
                      const OptionalTensor& pool_v_scale, const OptionalTensor& bias, const at::Tensor& out);

void gated_cross_attention(const std::string& set, const at::Tensor& q, const at::Tensor& text_k,
                           const at::Tensor& text_v, const at::Tensor& text_page, const OptionalTensor& image_k,
                           const OptionalTensor& image_v,
                           const OptionalTensor& image_lengths, const OptionalTensor& image_page,
                           const OptionalTensor& strength, const OptionalTensor& group, const OptionalTensor& masks,
                           const OptionalTensor& mask_index, const at::Tensor& out);

void token_stats(const std::string& set, const std::vector<at::Tensor>& xs, const at::Tensor& mean,
                 const at::Tensor& variance);

}  // namespace stylefast
