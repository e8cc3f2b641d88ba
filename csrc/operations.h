// The CPU operations on tensors; their formulas stand in kernels/. `set` is what instruction_set() says. Every function
// fills its last arguments and throws std::invalid_argument for an index out of range or a tensor that its kernels
// can't take.
#pragma once

#include <vector>

#include "arguments.h"

namespace stylefast {

void shared_attention(const std::string& set, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& page, const at::Tensor& mode, const at::Tensor& scale, const at::Tensor& shift,
                      const OptionalTensor& bias, const OptionalTensor& gain, const OptionalTensor& offset,
                      const OptionalTensor& pool_k, const OptionalTensor& pool_v, const OptionalTensor& pool_k_scale,
                      const OptionalTensor& pool_v_scale, const at::Tensor& out);

void gated_cross_attention(const std::string& set, const at::Tensor& q, const at::Tensor& text_k,
                           const at::Tensor& text_v, const at::Tensor& text_page, const OptionalTensor& text_lengths,
                           const OptionalTensor& image_k, const OptionalTensor& image_v,
                           const OptionalTensor& image_lengths, const OptionalTensor& image_page,
                           const OptionalTensor& strength, const OptionalTensor& group, const OptionalTensor& masks,
                           const OptionalTensor& mask_index, const at::Tensor& out);

void token_stats(const std::string& set, const std::vector<at::Tensor>& xs, const at::Tensor& mean,
                 const at::Tensor& variance);

void adain_affine(const std::string& set, const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& page,
                  const at::Tensor& strength, const OptionalTensor& pool_mean, const OptionalTensor& pool_variance,
                  const at::Tensor& gain, const at::Tensor& offset);

void dequantise(const std::string& set, const at::Tensor& scale, const at::Tensor& values, const at::Tensor& out);

void geglu(const std::string& set, const at::Tensor& x, const at::Tensor& out);

void layer_norm(const std::string& set, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                double eps, const at::Tensor& out);

void add_layer_norm(const std::string& set, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                    const at::Tensor& bias, double eps, const at::Tensor& total, const at::Tensor& out);

void group_norm_silu(const std::string& set, const at::Tensor& x, std::int64_t groups, const at::Tensor& weight,
                     const at::Tensor& bias, double eps, bool silu, const OptionalTensor& page,
                     const OptionalTensor& pool_mean, const OptionalTensor& pool_variance, std::int64_t pool_elements,
                     const at::Tensor& out);

void guided_step(const std::string& set, const at::Tensor& latents, const at::Tensor& anchor, const at::Tensor& history,
                 const at::Tensor& predictions, const at::Tensor& branch_rows, const at::Tensor& branch_weights,
                 const at::Tensor& rescale, const at::Tensor& denoised, const at::Tensor& update,
                 const at::Tensor& noise, const at::Tensor& next_latents, const at::Tensor& next_anchor,
                 const at::Tensor& next_history);

void row_lora(const std::string& set, const at::Tensor& x, const at::Tensor& down, const at::Tensor& up,
              const at::Tensor& unit, const at::Tensor& scale, std::int64_t stride, std::int64_t padding,
              const std::vector<at::Tensor>& ys);

}  // namespace stylefast
