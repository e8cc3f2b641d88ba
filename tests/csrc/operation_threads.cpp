// Every operation of the CPU, on four threads each and two of them at once, in every instruction set that this machine
// has. Built with the thread sanitizer; exits with 1 if a result differs from that of the first call.
#include <ATen/ATen.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu_features.h"
#include "../../csrc/operations.h"

using at::Tensor;
using Outputs = std::vector<Tensor>;
using Call = std::function<Outputs(const std::string&)>;

namespace {

constexpr std::int64_t kRows = 3, kTokens = 130, kHeads = 2, kWidth = 40, kPages = 2;

const at::TensorOptions kFloat = at::TensorOptions(at::kFloat), kLong = at::TensorOptions(at::kLong);

Tensor randn(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) { return at::randn(sizes, kFloat).to(type); }

Tensor numbers(const std::vector<std::int64_t>& values) { return at::tensor(values, kLong); }

Call shared(at::ScalarType type) {
    const std::vector<std::int64_t> sizes{kRows, kTokens, kHeads, kWidth};
    const Tensor q = randn(sizes, type), k = randn(sizes, type), v = randn(sizes, type);
    const Tensor pool = randn({kPages, 70, kHeads, kWidth}, type);
    const Tensor page = numbers({-1, 0, kRows + 1}).view({kRows, 1}), mode = numbers({0, 1, 2});
    const Tensor ones = at::ones({kRows, 1}), zeros = at::zeros({kRows, 1});
    const Tensor gain = at::rand({3, kRows, kHeads, kWidth}) + 0.5, offset = randn({3, kRows, kHeads, kWidth});
    return [=](const std::string& set) {
        const Tensor out = at::empty_like(q);
        stylefast::shared_attention(set, q, k, v, page, mode, ones, zeros, {}, gain, offset, pool, pool, {}, {}, out);
        return Outputs{out};
    };
}

Call gated(at::ScalarType type) {
    const Tensor q = randn({kRows, kTokens, kHeads, kWidth}, type), text = randn({2, 77, kHeads, kWidth}, type);
    const Tensor image = randn({2, 4, kHeads, kWidth}, type), lengths = numbers({4, 3}), text_page = numbers({0, 1, 1});
    const Tensor text_lengths = numbers({77, 50});
    const Tensor image_page = numbers({0, -1, 1}).view({kRows, 1}), group = numbers({0, 0, 0}).view({kRows, 1});
    const Tensor strength = at::rand({kRows, 1}), masks = at::rand({1, kTokens}), mask = numbers({0, -1, -1});
    return [=](const std::string& set) {
        const Tensor out = at::empty_like(q);
        stylefast::gated_cross_attention(set, q, text, text, text_page, text_lengths, image, image, lengths, image_page,
                                         strength, group, masks, mask.view({kRows, 1}), out);
        return Outputs{out};
    };
}

Call statistics(at::ScalarType type) {
    const Tensor x = randn({kRows, kTokens, kHeads, kWidth}, type);
    const Tensor page = numbers({-1, 0, kRows}), strength = at::rand({kRows, 1});
    const Tensor pool = at::rand({1, kPages, kHeads, kWidth}) + 0.1;
    return [=](const std::string& set) {
        const Tensor mean = at::empty({1, kRows, kHeads, kWidth}), variance = at::empty_like(mean);
        const Tensor gain = at::empty_like(mean), offset = at::empty_like(mean);
        stylefast::token_stats(set, {x}, mean, variance);
        stylefast::adain_affine(set, mean, variance, page, strength, pool, pool, gain, offset);
        return Outputs{mean, variance, gain, offset};
    };
}

// tall enough for several threads
Call rows(at::ScalarType type) {
    const Tensor x = randn({700, 320}, type), residual = randn({700, 320}, type);
    const Tensor weight = randn({320}, type), bias = randn({320}, type);
    const Tensor codes = (50 * at::randn({6, 200, 330})).to(at::kFloat8_e4m3fn), scale = at::rand({6, 330});
    return [=](const std::string& set) {
        const Tensor gated = at::empty({700, 160}, x.options()), normed = at::empty_like(x);
        const Tensor total = at::empty_like(x), both = at::empty_like(x),
                     values = at::empty({6, 200, 330}, x.options());
        stylefast::geglu(set, x, gated);
        stylefast::layer_norm(set, x, weight, bias, 1e-5, normed);
        stylefast::add_layer_norm(set, x, residual, weight, bias, 1e-5, total, both);
        stylefast::dequantise(set, scale, codes, values);
        return Outputs{gated, normed, total, both, values};
    };
}

Call groups(at::ScalarType type, at::MemoryFormat format) {
    const Tensor x = randn({kRows, 64, 40, 40}, type).contiguous(format);
    const Tensor weight = randn({64}, type), bias = randn({64}, type), page = numbers({-1, 0, kRows});
    const Tensor pool = at::rand({kPages, 8}) + 0.1;
    return [=](const std::string& set) {
        const Tensor out = at::empty_like(x);
        stylefast::group_norm_silu(set, x, 8, weight, bias, 1e-5, true, page, pool, pool, 8 * 1600, out);
        return Outputs{out};
    };
}

// a linear layer with two parts, whose rows have different units, and a convolution with two rows that have the same
Call loras(at::ScalarType type) {
    const Tensor tokens = randn({kRows, kTokens, 300}, type), image = randn({kRows, 20, 13, 9}, type);
    const Tensor pixels = image.contiguous(at::MemoryFormat::ChannelsLast), scale = at::rand({kRows, 2});
    const Tensor down = randn({4, 1, 300, 16}, type), taps = randn({4, 9, 20, 16}, type), up = randn({4, 16, 70}, type);
    const Tensor unit = numbers({-1, 0, 1, 2, 3, -1, 2, 2, -1, -1, 0, 3}).view({2, kRows, 2});
    const Tensor same = numbers({0, 1, 3, -1, 0, 1}).view({1, kRows, 2});
    return [=](const std::string& set) {
        const Tensor one = at::zeros({kRows, kTokens, 70}, tokens.options()), two = at::zeros_like(one);
        const Tensor seen = at::zeros({kRows, 70, 7, 5}, tokens.options());
        stylefast::row_lora(set, tokens, down, up, unit, scale, 1, 0, {one, two});
        stylefast::row_lora(set, pixels, taps, up, same, scale, 2, 1, {seen});
        return Outputs{one, two, seen};
    };
}

Call step() {
    const Tensor latents = randn({2, 4, 64, 64}), anchor = randn({2, 4, 64, 64}), noise = randn({2, 4, 64, 64});
    const Tensor history = randn({2, 2, 4, 64, 64}), predictions = randn({4, 4, 64, 64});
    const Tensor branches = numbers({0, -1, -1, 1, 2, -1, -1, 3}).view({2, 4});
    const Tensor weights = at::rand({2, 4}), rescale = at::rand({2}), denoised = at::rand({2, 2});
    const Tensor update = at::rand({2, 2, 6});
    return [=](const std::string& set) {
        Outputs outputs{at::empty_like(latents), at::empty_like(latents), at::empty_like(history)};
        stylefast::guided_step(set, latents, anchor, history, predictions, branches, weights, rescale, denoised, update,
                               noise, outputs[0], outputs[1], outputs[2]);
        return outputs;
    };
}

void demand_equal(const char* what, const std::string& set, const Outputs& found, const Outputs& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (at::equal(found[i], expected[i])) continue;
        std::fprintf(stderr, "wrong: output %zu of %s on %s\n", i, what, set.c_str());
        std::_Exit(1);
    }
}

}  // namespace

int main(int count, char**) {
    at::manual_seed(7);
    std::vector<std::string> sets;
    for (const char* set : {"avx2", "avx512", "avx512_bf16"}) {
        setenv("STYLEFAST_CPU", set, 1);
        try {
            sets.push_back(stylefast::instruction_set());
        } catch (const std::invalid_argument&) {  // this machine does not have it
        }
    }
    int calls = 0;
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
        const std::vector<std::pair<const char*, Call>> operations{
            {"shared_attention", shared(type)},
            {"gated_cross_attention", gated(type)},
            {"token_stats and adain_affine", statistics(type)},
            {"operations on rows", rows(type)},
            {"group_norm_silu", groups(type, at::MemoryFormat::Contiguous)},
            {"group_norm_silu, channels last", groups(type, at::MemoryFormat::ChannelsLast)},
            {"row_lora", loras(type)},
            {"guided_step", step()}};
        for (const std::string& set : sets) {
            for (const auto& [what, call] : operations) {
                const Outputs expected = call(set);
                std::vector<Outputs> found(2);
                std::thread other([&] { found[0] = call(set); });
                found[1] = call(set);
                other.join();
                for (const Outputs& outputs : found) demand_equal(what, set, outputs, expected);
                ++calls;
            }
        }
    }
    int shared_between_threads = 0;
    if (count > 1) {  // a planted race
        std::thread other([&] { ++shared_between_threads; });
        ++shared_between_threads;
        other.join();
    }
    std::printf("%d operations on %zu instruction sets\n", calls, sets.size());
    return sets.empty() ? 1 : 0;
}
