#include "operations.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "attention.h"
#include "parallel.h"

namespace stylefast {
namespace {

constexpr std::int64_t kMaxChunk = 512;  // its queries and sums stay in L2
constexpr std::int64_t kUnitsPerThread = 4;

void check_head_size(std::int64_t d) {
    for (const std::int64_t size : {32, 40, 64, 80, 128}) {
        if (d == size) return;
    }
    refuse("the head size is " + std::to_string(d) + ", but the kernels take 32, 40, 64, 80 and 128");
}

const Kernels& kernels_for(const std::string& set, Element type) {
    const Kernels* kernels = nullptr;
    if (set == "avx512_bf16") kernels = type == Element::bf16 ? avx512_bf16_kernels() : avx512_kernels();
    if (set == "avx512") kernels = avx512_kernels();
    if (set == "avx2") kernels = avx2_kernels();
    if (!kernels) throw std::runtime_error("the CPU kernels need AVX2, FMA and F16C, which this machine does not have");
    return *kernels;
}

std::int64_t chunk_of(std::int64_t tokens, std::int64_t row_heads, std::int64_t lanes) {
    const auto round_up = [&](std::int64_t x) { return (x + lanes - 1) / lanes * lanes; };
    std::int64_t chunk = std::min(kMaxChunk, round_up(tokens));
    const std::int64_t wanted = kUnitsPerThread * at::get_num_threads();
    while (chunk > lanes && row_heads * ((tokens + chunk - 1) / chunk) < wanted) chunk = round_up(chunk / 2);
    return chunk;
}

}  // namespace

void shared_attention(const std::string& set, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& page, const at::Tensor& mode, const at::Tensor& scale, const at::Tensor& shift,
                      const OptionalTensor& bias, const OptionalTensor& gain, const OptionalTensor& offset,
                      const OptionalTensor& pool_k, const OptionalTensor& pool_v, const OptionalTensor& pool_k_scale,
                      const OptionalTensor& pool_v_scale, const at::Tensor& out) {
    SharedAttention a{};
    a.q = tokens_of("q", q);
    if (a.q.type == Element::f8) refuse("q is fp8, which only pool pages may be");
    a.rows = q.size(0), a.tokens = q.size(1), a.heads = q.size(2), a.d = q.size(3);
    check_head_size(a.d);
    a.k = tokens_like("k", k, q.sizes(), a.q);
    a.v = tokens_like("v", v, q.sizes(), a.q);
    a.out = tokens_like("out", out, q.sizes(), a.q);

    std::vector<at::Tensor> kept;  // copies must outlive the kernels
    const auto keep = [&](at::Tensor x) -> const at::Tensor& { return kept.emplace_back(std::move(x)); };
    kept.reserve(16);
    if (pool_k || pool_v) {
        a.pool_k = tokens_of("pool_k", need("pool_k", pool_k));
        a.pages = pool_k->size(0), a.page_tokens = pool_k->size(1);
        a.pool_v = tokens_like("pool_v", need("pool_v", pool_v), {a.pages, a.page_tokens, a.heads, a.d}, a.pool_k);
        if (pool_k->sizes() != pool_v->sizes()) refuse("pool_k must have the heads and channels of q");
        if (a.pool_k.type == Element::f8) {
            for (const auto& [name, source, to] : {std::make_tuple("pool_k_scale", &pool_k_scale, &a.pool_k_scale),
                                                   std::make_tuple("pool_v_scale", &pool_v_scale, &a.pool_v_scale)}) {
                const at::Tensor& x = keep(channels_side_by_side(name, need(name, *source), 3));
                if (x.sizes() != at::IntArrayRef({a.pages, a.heads, a.d})) {
                    refuse(std::string(name) + " must be [pages, heads, d]");
                }
                *to = channels_of(x);
            }
        } else if (a.pool_k.type != a.q.type) {
            refuse("pool_k must have the type of q or be fp8 e4m3");
        }
    }

    if (page.dim() != 2) refuse("page must be [rows, references]");
    a.references = page.size(1);
    const at::Tensor& pages = keep(contiguous("page", page, at::ScalarType::Long, {a.rows, a.references}));
    const at::Tensor& modes = keep(contiguous("mode", mode, at::ScalarType::Long, {a.rows}));
    check_range("page", pages, -1, a.rows + a.pages);
    check_range("mode", modes, 0, 3);
    a.page = pages.const_data_ptr<std::int64_t>();
    a.mode = modes.const_data_ptr<std::int64_t>();
    a.scale = keep(contiguous("scale", scale, at::ScalarType::Float, {a.rows, a.references})).const_data_ptr<float>();
    a.shift = keep(contiguous("shift", shift, at::ScalarType::Float, {a.rows, a.references})).const_data_ptr<float>();
    if (gain || offset) {
        for (const auto& [name, source, to] :
             {std::make_tuple("gain", &gain, &a.gain), std::make_tuple("offset", &offset, &a.offset)}) {
            const at::Tensor& x = keep(channels_side_by_side(name, need(name, *source), 4));
            if (a.moved != 0 && a.moved != x.size(0)) refuse("gain and offset must move as many tensors");
            a.moved = x.size(0);
            if ((a.moved != 2 && a.moved != 3) || x.sizes() != at::IntArrayRef({a.moved, a.rows, a.heads, a.d})) {
                refuse(std::string(name) + " must be [2 or 3, rows, heads, d]");
            }
            *to = channels_of(x);
        }
    }
    if (bias) {
        const at::Tensor& x = keep(channels_side_by_side("bias", *bias, 2));
        if (x.size(0) < a.rows + a.pages || x.size(1) < std::max(a.tokens, a.page_tokens)) {
            refuse("bias must be [rows + pages, tokens of the longest page]");
        }
        a.bias = x.const_data_ptr<float>();
        a.bias_row = x.stride(0);
    }
    if (out.numel() == 0) return;

    const Kernels& kernels = kernels_for(set, a.q.type);
    a.chunk = chunk_of(a.tokens, a.rows * a.heads, kernels.lanes);
    const std::int64_t units = a.rows * a.heads * ((a.tokens + a.chunk - 1) / a.chunk);
    run_units(units, units, kernels.shared_scratch(a),
              [&](std::int64_t unit, char* scratch) { kernels.shared_unit(a, unit, scratch); });
}

void gated_cross_attention(const std::string& set, const at::Tensor& q, const at::Tensor& text_k,
                           const at::Tensor& text_v, const at::Tensor& text_page, const OptionalTensor& text_lengths,
                           const OptionalTensor& image_k, const OptionalTensor& image_v,
                           const OptionalTensor& image_lengths, const OptionalTensor& image_page,
                           const OptionalTensor& strength, const OptionalTensor& group, const OptionalTensor& masks,
                           const OptionalTensor& mask_index, const at::Tensor& out) {
    GatedCrossAttention a{};
    a.q = tokens_of("q", q);
    if (a.q.type == Element::f8) refuse("q is fp8, which no cross-attention takes");
    a.rows = q.size(0), a.tokens = q.size(1), a.heads = q.size(2), a.d = q.size(3);
    check_head_size(a.d);
    a.out = tokens_like("out", out, q.sizes(), a.q);
    if (text_k.dim() != 4) refuse("text_k must be [pages, tokens, heads, d]");
    const std::int64_t text_pages = text_k.size(0);
    a.text_tokens = text_k.size(1);
    a.text_k = tokens_like("text_k", text_k, {text_pages, a.text_tokens, a.heads, a.d}, a.q);
    a.text_v = tokens_like("text_v", text_v, {text_pages, a.text_tokens, a.heads, a.d}, a.q);

    std::vector<at::Tensor> kept;  // copies must outlive the kernels
    const auto keep = [&](at::Tensor x) -> const at::Tensor& { return kept.emplace_back(std::move(x)); };
    kept.reserve(16);
    const auto integers = [&](const char* name, const at::Tensor& x, at::IntArrayRef sizes, std::int64_t low,
                              std::int64_t end) {
        const at::Tensor& whole = keep(contiguous(name, x, at::ScalarType::Long, sizes));
        check_range(name, whole, low, end);
        return whole.const_data_ptr<std::int64_t>();
    };
    a.text_page = integers("text_page", text_page, {a.rows}, 0, text_pages);
    if (text_lengths) a.text_lengths = integers("text_lengths", *text_lengths, {text_pages}, 0, a.text_tokens + 1);
    if (image_k || image_page) {
        const at::Tensor& keys = need("image_k", image_k);
        if (keys.dim() != 4) refuse("image_k must be [pages, tokens, heads, d]");
        const std::int64_t pages = keys.size(0), tokens = keys.size(1);
        a.image_k = tokens_like("image_k", keys, {pages, tokens, a.heads, a.d}, a.q);
        a.image_v = tokens_like("image_v", need("image_v", image_v), {pages, tokens, a.heads, a.d}, a.q);
        a.image_lengths = integers("image_lengths", need("image_lengths", image_lengths), {pages}, 0, tokens + 1);
        if (need("image_page", image_page).dim() != 2) refuse("image_page must be [rows, segments]");
        a.segments = image_page->size(1);
        const std::vector<std::int64_t> shape = {a.rows, a.segments};
        a.image_page = integers("image_page", *image_page, shape, -1, pages);
        a.strength = keep(contiguous("strength", need("strength", strength), at::ScalarType::Float, shape))
                         .const_data_ptr<float>();
        a.group =
            keep(contiguous("group", need("group", group), at::ScalarType::Long, shape)).const_data_ptr<std::int64_t>();
        if (masks && mask_index) {
            const at::Tensor& vectors = keep(channels_side_by_side("masks", *masks, 2));
            if (vectors.size(1) != a.tokens) refuse("masks must be [masks, tokens of q]");
            a.masks = vectors.const_data_ptr<float>();
            a.mask_row = vectors.stride(0);
            a.mask_index = integers("mask_index", *mask_index, shape, -1, vectors.size(0));
        }
    }
    if (out.numel() == 0) return;

    const Kernels& kernels = kernels_for(set, a.q.type);
    a.chunk = chunk_of(a.tokens, a.rows * a.heads, kernels.lanes);
    const std::int64_t units = a.rows * a.heads * ((a.tokens + a.chunk - 1) / a.chunk);
    run_units(units, units, kernels.gated_scratch(a),
              [&](std::int64_t unit, char* scratch) { kernels.gated_unit(a, unit, scratch); });
}

}  // namespace stylefast
