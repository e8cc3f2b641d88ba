#include "streaming.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operations.h"
#include "parallel.h"

namespace stylefast {
namespace {

// elements of a group or, channels last, positions: what stays in L1 or L2 between two passes
constexpr std::int64_t kNormBlock = 4096, kPositionBlock = 64;
// products of row_lora in the time that the other operations take for a byte
constexpr std::int64_t kProductsPerByte = 6;

const StreamingKernels& streaming_for(const std::string& set) {
    const StreamingKernels* kernels = set.empty() ? nullptr : set == "avx2" ? avx2_streaming() : avx512_streaming();
    if (!kernels) throw std::runtime_error("the CPU kernels need AVX2, FMA and F16C, which this machine does not have");
    return *kernels;
}

Element float_of(const char* name, const at::Tensor& x) {
    const Element type = element_of(name, x);
    if (type == Element::f8) refuse(std::string(name) + " is fp8, which only pool pages may be");
    return type;
}

std::int64_t ceil_divide(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

char* data_of(const at::Tensor& x) { return static_cast<char*>(const_cast<void*>(x.const_data_ptr())); }

// x [..., columns] as evenly spaced rows; none where the leading dimensions are not that, or the columns apart
std::optional<Lines> even_rows(const char* name, const at::Tensor& x) {
    const std::int64_t last = x.dim() - 1, columns = x.size(last);
    if (columns > 1 && x.stride(last) != 1) return std::nullopt;
    std::int64_t row = columns, next = -1;  // strides of a row and of the next dimension outwards
    for (std::int64_t dim = last - 1; dim >= 0; --dim) {
        if (x.size(dim) == 1) continue;
        if (next < 0)
            row = x.stride(dim);
        else if (x.stride(dim) != next)
            return std::nullopt;
        next = x.stride(dim) * x.size(dim);
    }
    return Lines{data_of(x), float_of(name, x), row * static_cast<std::int64_t>(x.element_size())};
}

// The rows of an input; `kept` holds the copy where there has to be one.
Lines input_rows(const char* name, const at::Tensor& x, at::Tensor& kept) {
    if (const auto rows = even_rows(name, x)) return *rows;
    kept = x.contiguous();
    return *even_rows(name, kept);
}

Lines output_rows(const char* name, const at::Tensor& x, Element type) {
    const auto rows = even_rows(name, x);
    if (!rows) refuse(std::string(name) + " has no evenly spaced rows");
    if (rows->type != type) refuse(std::string(name) + " is " + c10::toString(x.scalar_type()) + ", unlike the input");
    if (x.is_contiguous()) prefer_huge_pages(rows->data, x.nbytes());
    return *rows;
}

// All of one row, from dimension 1 on, side by side in order.
bool dense_rows(const at::Tensor& x) {
    std::int64_t stride = 1;
    for (std::int64_t dim = x.dim() - 1; dim >= 1 && x.numel() > 0; --dim) {
        if (x.size(dim) != 1 && x.stride(dim) != stride) return false;
        stride *= x.size(dim);
    }
    return true;
}

Lines dense_lines(const char* name, const at::Tensor& x) {
    return {data_of(x), float_of(name, x), x.stride(0) * static_cast<std::int64_t>(x.element_size())};
}

void check_channels(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
    check_sizes(name, x, sizes);
    if (x.scalar_type() != at::ScalarType::Float || (x.size(3) > 1 && x.stride(3) != 1)) {
        refuse(std::string(name) + " must be fp32, channels side by side");
    }
}

void norm_rows(const std::string& set, const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
               const at::Tensor& bias, double eps, const at::Tensor* total, const at::Tensor& out) {
    if (x.dim() < 1 || x.size(-1) == 0) refuse("x needs at least one channel");
    LayerNorm a{};
    a.channels = x.size(-1);
    a.eps = eps;
    const Element type = float_of("x", x);
    const at::Tensor weights = contiguous("weight", weight, x.scalar_type(), {a.channels});
    const at::Tensor biases = contiguous("bias", bias, x.scalar_type(), {a.channels});
    a.weight = data_of(weights);
    a.bias = data_of(biases);
    check_sizes("out", out, x.sizes());
    if (residual) {
        check_sizes("residual", *residual, x.sizes());
        check_sizes("total", *total, x.sizes());
        if (residual->scalar_type() != x.scalar_type()) refuse("residual does not have x's type");
    }
    const std::int64_t rows = x.numel() / a.channels;
    if (rows == 0) return;
    at::Tensor x_copy, residual_copy;
    a.x = input_rows("x", x, x_copy);
    a.out = output_rows("out", out, type);
    if (residual) {
        a.residual = input_rows("residual", *residual, residual_copy);
        a.total = output_rows("total", *total, type);
    }
    const StreamingKernels& kernels = streaming_for(set);
    const std::int64_t bytes = (residual ? 4 : 2) * a.channels * static_cast<std::int64_t>(x.element_size());
    run_pieces(rows, bytes, 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.layer_norm(a, first, last); });
}

enum class Layout { contiguous, channels_last, other };

// of one row of [rows, channels, h, w]
Layout layout_of(const at::Tensor& x) {
    if (dense_rows(x)) return Layout::contiguous;
    const std::int64_t channels = x.size(1), width = x.size(3);
    const auto is = [&](std::int64_t dim, std::int64_t stride) { return x.size(dim) == 1 || x.stride(dim) == stride; };
    return is(1, 1) && is(3, channels) && is(2, width * channels) ? Layout::channels_last : Layout::other;
}

// factor on the output of every picture: 1 - strength + strength * deviation of the full branch / own deviation
std::vector<float> rescale_factors(const GuidedStep& a, const float* rescale) {
    std::vector<float> factors(a.pictures, 1.0f);
    for (std::int64_t picture = 0; picture < a.pictures; ++picture) {
        if (!a.rescaled[picture]) continue;
        double deviation[2];
        for (int which = 0; which < 2; ++which) {
            const double* blocks = a.moments + picture * a.blocks * 4 + 2 * which;
            const auto count = [&](std::int64_t block) {
                return static_cast<double>(std::min(GuidedStep::block, a.numbers - block * GuidedStep::block));
            };
            double mean = 0.0, squares = 0.0;
            for (std::int64_t block = 0; block < a.blocks; ++block) mean += count(block) * blocks[block * 4];
            mean /= static_cast<double>(a.numbers);
            for (std::int64_t block = 0; block < a.blocks; ++block) {
                const double away = blocks[block * 4] - mean;
                squares += blocks[block * 4 + 1] + count(block) * away * away;
            }
            deviation[which] = std::sqrt(squares / static_cast<double>(a.numbers - 1));
        }
        if (!(deviation[0] > 0.0)) continue;
        const double strength = rescale[picture];
        factors[picture] = static_cast<float>(1.0 - strength + strength * deviation[1] / deviation[0]);
    }
    return factors;
}

// x [rows, tokens, channels] or [rows, channels, lines, pixels] with channels side by side; the copy that has to be
// made otherwise is left in `kept`
RowLora::Pixels pixels_of(const at::Tensor& x, at::Tensor& kept) {
    const std::int64_t channels = x.dim() == 3 ? 2 : 1;
    const bool dense = x.size(channels) == 1 || x.stride(channels) == 1;
    kept = dense ? x : x.dim() == 3 ? x.contiguous() : x.contiguous(at::MemoryFormat::ChannelsLast);
    const std::int64_t size = kept.element_size();
    if (x.dim() == 3) return {data_of(kept), kept.stride(0) * size, 0, kept.stride(1) * size};
    return {data_of(kept), kept.stride(0) * size, kept.stride(2) * size, kept.stride(3) * size};
}

// The rows of row_lora by what they use: units with a scale of 0 are no use, and the order of sums counts.
class LoraGroups {
  public:
    // unit [parts, rows, N], scale [rows, N], contiguous; `tokens` of each row
    LoraGroups(const at::Tensor& unit, const at::Tensor& scale, std::int64_t tokens) {
        const std::int64_t parts = unit.size(0), rows = unit.size(1), most = unit.size(2);
        const std::int64_t* numbers = unit.const_data_ptr<std::int64_t>();
        const float* strengths = scale.const_data_ptr<float>();
        for (std::int64_t row = 0; row < rows; ++row) {
            Used used{};
            std::vector<float> scales;
            for (std::int64_t part = 0; part < parts; ++part) {
                for (std::int64_t n = 0; n < most; ++n) {
                    const std::int64_t number = numbers[(part * rows + row) * most + n];
                    if (number < 0 || strengths[row * most + n] == 0.0f) continue;
                    used.numbers.push_back(number);
                    scales.push_back(strengths[row * most + n]);
                    ++used.counts[static_cast<std::size_t>(part)];
                }
            }
            if (scales.empty()) continue;
            scales_.push_back(std::move(scales));
            rows_[used].push_back({row, scales_.back().data()});
        }
        std::int64_t last = 0;
        for (const auto& [used, members] : rows_) {
            const auto count = static_cast<std::int64_t>(members.size());
            tokens_ += count * tokens;
            last += ceil_divide(count * tokens, RowLora::block);
            RowLora::Group group{used.numbers.data(), {}, members.data(), count, last};
            std::copy(used.counts.begin(), used.counts.end(), group.counts);
            groups_.push_back(group);
        }
    }

    const std::vector<RowLora::Group>& all() const { return groups_; }
    std::int64_t tokens() const { return tokens_; }  // of all of them

  private:
    struct Used {
        std::array<std::int64_t, RowLora::most_parts> counts;
        std::vector<std::int64_t> numbers;

        bool operator<(const Used& other) const {
            return std::tie(counts, numbers) < std::tie(other.counts, other.numbers);
        }
    };

    std::map<Used, std::vector<RowLora::Row>> rows_;
    std::vector<std::vector<float>> scales_;
    std::vector<RowLora::Group> groups_;
    std::int64_t tokens_ = 0;
};

}  // namespace

void token_stats(const std::string& set, const std::vector<at::Tensor>& xs, const at::Tensor& mean,
                 const at::Tensor& variance) {
    TokenStats a{};
    a.count = static_cast<std::int64_t>(xs.size());
    check_range("the number of tensors", a.count, 1, 4);
    a.x[0] = tokens_of("x", xs[0]);
    float_of("x", xs[0]);
    a.rows = xs[0].size(0), a.tokens = xs[0].size(1), a.heads = xs[0].size(2), a.d = xs[0].size(3);
    if (a.d % 8 != 0) refuse("the head size is " + std::to_string(a.d) + ", not a multiple of 8");
    for (std::int64_t i = 1; i < a.count; ++i) a.x[i] = tokens_like("x", xs[i], xs[0].sizes(), a.x[0]);
    check_channels("mean", mean, {a.count, a.rows, a.heads, a.d});
    check_channels("variance", variance, {a.count, a.rows, a.heads, a.d});
    a.mean = channels_of(mean);
    a.variance = channels_of(variance);
    if (mean.numel() == 0) return;
    const StreamingKernels& kernels = streaming_for(set);
    run_pieces(a.count * a.rows * a.heads, a.tokens * a.d * static_cast<std::int64_t>(xs[0].element_size()), 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.token_stats(a, first, last); });
}

void adain_affine(const std::string& set, const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& page,
                  const at::Tensor& strength, const OptionalTensor& pool_mean, const OptionalTensor& pool_variance,
                  const at::Tensor& gain, const at::Tensor& offset) {
    AdainAffine a{};
    const at::Tensor means = channels_side_by_side("mean", mean, 4);
    const at::Tensor variances = channels_side_by_side("variance", variance, 4);
    a.parts = mean.size(0), a.rows = mean.size(1), a.heads = mean.size(2), a.d = mean.size(3);
    check_sizes("variance", variance, mean.sizes());
    check_channels("gain", gain, mean.sizes());
    check_channels("offset", offset, mean.sizes());
    a.mean = channels_of(means), a.variance = channels_of(variances);
    a.gain = channels_of(gain), a.offset = channels_of(offset);
    std::int64_t pages = 0;
    at::Tensor pool_means, pool_variances;
    if (pool_mean || pool_variance) {
        pool_means = channels_side_by_side("pool_mean", need("pool_mean", pool_mean), 4);
        pool_variances = channels_side_by_side("pool_variance", need("pool_variance", pool_variance), 4);
        pages = pool_means.size(1);
        check_sizes("pool_mean", pool_means, {a.parts, pages, a.heads, a.d});
        check_sizes("pool_variance", pool_variances, pool_means.sizes());
        a.pool_mean = channels_of(pool_means), a.pool_variance = channels_of(pool_variances);
    }
    const at::Tensor rows_pages = contiguous("page", page, at::ScalarType::Long, {a.rows});
    check_range("page", rows_pages, -1, a.rows + pages);
    a.page = rows_pages.const_data_ptr<std::int64_t>();
    const at::Tensor strengths = contiguous("strength", strength, at::ScalarType::Float, {a.rows, a.parts});
    a.strength = strengths.const_data_ptr<float>();
    if (mean.numel() == 0) return;
    const StreamingKernels& kernels = streaming_for(set);
    run_pieces(a.parts * a.rows * a.heads, 6 * 4 * a.d, 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.adain_affine(a, first, last); });
}

void dequantise(const std::string& set, const at::Tensor& scale, const at::Tensor& values, const at::Tensor& out) {
    if (values.dim() != 3) refuse("values must be [groups, tokens, channels]");
    if (element_of("values", values) != Element::f8) refuse("values must be fp8 e4m3");
    check_sizes("out", out, values.sizes());
    const Element type = float_of("out", out);
    const at::Tensor scales = contiguous("scale", scale, at::ScalarType::Float, {values.size(0), values.size(2)});
    if (out.numel() == 0) return;
    Dequantise a{};
    a.tokens = values.size(1);
    a.channels = values.size(2);
    a.scale = scales.const_data_ptr<float>();
    const at::Tensor codes = values.contiguous();
    a.values = {data_of(codes), Element::f8, a.channels};
    a.out = output_rows("out", out, type);
    const StreamingKernels& kernels = streaming_for(set);
    run_pieces(out.numel() / a.channels, a.channels * (1 + static_cast<std::int64_t>(out.element_size())), 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.dequantise(a, first, last); });
}

void geglu(const std::string& set, const at::Tensor& x, const at::Tensor& out) {
    if (x.dim() < 1 || x.size(-1) % 2 != 0) refuse("x must have an even last dimension");
    std::vector<std::int64_t> sizes = x.sizes().vec();
    sizes.back() /= 2;
    check_sizes("out", out, sizes);
    Geglu a{};
    a.inner = sizes.back();
    const Element type = float_of("x", x);
    if (out.numel() == 0) return;
    at::Tensor x_copy;
    a.x = input_rows("x", x, x_copy);
    a.out = output_rows("out", out, type);
    const StreamingKernels& kernels = streaming_for(set);
    run_pieces(out.numel() / a.inner, 3 * a.inner * static_cast<std::int64_t>(x.element_size()), 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.geglu(a, first, last); });
}

void layer_norm(const std::string& set, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                double eps, const at::Tensor& out) {
    norm_rows(set, x, nullptr, weight, bias, eps, nullptr, out);
}

void add_layer_norm(const std::string& set, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                    const at::Tensor& bias, double eps, const at::Tensor& total, const at::Tensor& out) {
    norm_rows(set, x, &residual, weight, bias, eps, &total, out);
}

void group_norm_silu(const std::string& set, const at::Tensor& x, std::int64_t groups, const at::Tensor& weight,
                     const at::Tensor& bias, double eps, bool silu, const OptionalTensor& page,
                     const OptionalTensor& pool_mean, const OptionalTensor& pool_variance, std::int64_t pool_elements,
                     const at::Tensor& out) {
    if (x.dim() != 4) refuse("x has " + std::to_string(x.dim()) + " dimensions, not 4");
    GroupNorm a{};
    a.rows = x.size(0), a.channels = x.size(1), a.positions = x.size(2) * x.size(3);
    a.groups = groups, a.eps = eps, a.silu = silu;
    if (groups < 1 || a.channels % groups != 0) {
        refuse(std::to_string(a.channels) + " channels can't be split into " + std::to_string(groups) + " groups");
    }
    check_sizes("out", out, x.sizes());
    if (out.scalar_type() != x.scalar_type()) refuse("out does not have x's type");
    const Layout layout = layout_of(x);
    if (layout == Layout::other) refuse("x is neither contiguous nor channels last");
    // where both layouts are the same numbers in the same order, out may carry either's strides
    if (layout_of(out) != layout && a.channels > 1 && a.positions > 1) refuse("out does not have x's memory format");
    a.channels_last = layout == Layout::channels_last;
    a.x = dense_lines("x", x), a.out = dense_lines("out", out);
    const at::Tensor weights = contiguous("weight", weight, x.scalar_type(), {a.channels});
    const at::Tensor biases = contiguous("bias", bias, x.scalar_type(), {a.channels});
    a.weight = data_of(weights), a.bias = data_of(biases);
    std::int64_t pages = 0;
    at::Tensor rows_pages, pool_means, pool_variances;
    if (pool_mean || pool_variance) {
        pages = need("pool_mean", pool_mean).size(0);
        check_sizes("pool_mean", *pool_mean, {pages, groups});
        check_sizes("pool_variance", need("pool_variance", pool_variance), {pages, groups});
        // a bank's pages lie far apart, and copying all of them would cost more than the norm
        pool_means = channels_side_by_side("pool_mean", *pool_mean, 2);
        pool_variances = channels_side_by_side("pool_variance", *pool_variance, 2);
        a.pool_mean = pool_means.const_data_ptr<float>(), a.pool_mean_page = pool_means.stride(0);
        a.pool_variance = pool_variances.const_data_ptr<float>(), a.pool_variance_page = pool_variances.stride(0);
        a.pool_elements = static_cast<double>(pool_elements);
        if (pool_elements < 1) refuse("pool_elements is " + std::to_string(pool_elements) + ", but must be at least 1");
    }
    if (page) {
        rows_pages = contiguous("page", *page, at::ScalarType::Long, {a.rows});
        check_range("page", rows_pages, -1, a.rows + pages);
        a.page = rows_pages.const_data_ptr<std::int64_t>();
    }
    if (x.numel() == 0) return;
    if (out.is_non_overlapping_and_dense()) prefer_huge_pages(a.out.data, out.nbytes());

    const StreamingKernels& kernels = streaming_for(set);
    const std::int64_t elements = a.channels / groups * a.positions, size = x.element_size();
    a.block = a.channels_last ? kPositionBlock : kNormBlock;
    a.blocks = ceil_divide(a.channels_last ? a.positions : elements, a.block);
    const std::int64_t moments = a.rows * a.blocks * groups;
    // not make_unique, which would fill them with zeros first
    const std::unique_ptr<double[]> doubles(new double[2 * moments + 2 * a.rows * groups]);
    const std::unique_ptr<float[]> table(new float[a.rows * 3 * a.channels]);
    a.block_mean = doubles.get();
    a.block_squares = a.block_mean + moments;
    a.mean = a.block_squares + moments;
    a.variance = a.mean + a.rows * groups;
    a.table = table.get();

    const std::int64_t pieces = a.channels_last ? a.rows * a.blocks : moments;
    run_pieces(
        pieces, x.numel() * size / pieces, a.channels_last ? channels_scratch(a) : 0,
        [&](std::int64_t first, std::int64_t last, char* scratch) { kernels.block_moments(a, first, last, scratch); });
    run_pieces(a.rows, a.blocks * groups * 32, 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.group_moments(a, first, last); });
    kernels.channel_tables(a, 0, a.rows);
    const std::int64_t lines = a.rows * (a.channels_last ? a.positions : a.channels);
    run_pieces(lines, 2 * x.numel() * size / lines, 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.normalise(a, first, last); });
}

void guided_step(const std::string& set, const at::Tensor& latents, const at::Tensor& anchor, const at::Tensor& history,
                 const at::Tensor& predictions, const at::Tensor& branch_rows, const at::Tensor& branch_weights,
                 const at::Tensor& rescale, const at::Tensor& denoised, const at::Tensor& update,
                 const at::Tensor& noise, const at::Tensor& next_latents, const at::Tensor& next_anchor,
                 const at::Tensor& next_history) {
    if (latents.dim() != 4) refuse("latents has " + std::to_string(latents.dim()) + " dimensions, not 4");
    if (predictions.dim() != 4) refuse("predictions has " + std::to_string(predictions.dim()) + " dimensions, not 4");
    GuidedStep a{};
    const std::int64_t pictures = latents.size(0), c = latents.size(1), h = latents.size(2), w = latents.size(3);
    a.pictures = pictures;
    a.numbers = c * h * w;
    a.blocks = ceil_divide(a.numbers, GuidedStep::block);
    const std::vector<std::int64_t> shape = latents.sizes().vec(), history_shape = {pictures, 2, c, h, w};
    const std::int64_t rows = predictions.size(0);

    std::vector<at::Tensor> kept;  // copies must outlive the kernels
    const auto input = [&](const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
        check_sizes(name, x, sizes);
        return dense_lines(name, dense_rows(x) ? x : kept.emplace_back(x.contiguous()));
    };
    const auto output = [&](const char* name, const at::Tensor& x, at::IntArrayRef sizes, Element type) {
        check_sizes(name, x, sizes);
        if (!dense_rows(x)) refuse(std::string(name) + " must have its pictures contiguous");
        const Lines lines = dense_lines(name, x);
        if (lines.type != type) refuse(std::string(name) + " does not have the type of what it replaces");
        return lines;
    };
    const auto second = [&](Lines history) {  // the older of a picture's two
        history.data += a.numbers * (history.type == Element::f32 ? 4 : 2);
        return history;
    };
    a.latents = input("latents", latents, shape), a.anchor = input("anchor", anchor, shape);
    a.noise = input("noise", noise, shape);
    a.predictions = input("predictions", predictions, {rows, c, h, w});
    a.newest = input("history", history, history_shape), a.older = second(a.newest);
    a.next_latents = output("next_latents", next_latents, shape, a.latents.type);
    a.next_anchor = output("next_anchor", next_anchor, shape, a.anchor.type);
    a.next_newest = output("next_history", next_history, history_shape, a.newest.type);
    a.next_older = second(a.next_newest);

    const auto floats = [&](const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
        return kept.emplace_back(contiguous(name, x.to(at::ScalarType::Float), at::ScalarType::Float, sizes))
            .const_data_ptr<float>();
    };
    a.branch_weights = floats("branch_weights", branch_weights, {pictures, GuidedStep::branches});
    a.denoised = floats("denoised", denoised, {pictures, 2});
    a.update = floats("update", update, {pictures, 2, GuidedStep::terms});
    const float* strengths = floats("rescale", rescale, {pictures});
    const at::Tensor branches =
        contiguous("branch_rows", branch_rows, at::ScalarType::Long, {pictures, GuidedStep::branches});
    check_range("branch_rows", branches, -1, rows);
    a.branch_rows = branches.const_data_ptr<std::int64_t>();
    if (latents.numel() == 0) return;

    const StreamingKernels& kernels = streaming_for(set);
    const auto rescaled = std::make_unique<bool[]>(pictures);
    bool any = false;
    for (std::int64_t picture = 0; picture < pictures; ++picture) {
        const bool has_full = a.branch_rows[picture * GuidedStep::branches + GuidedStep::full] >= 0;
        rescaled[picture] = strengths[picture] != 0.0f && has_full && a.numbers > 1;
        any = any || rescaled[picture];
    }
    a.rescaled = rescaled.get();
    const std::int64_t pieces = pictures * a.blocks, bytes = GuidedStep::block * 4;
    std::vector<double> moments(any ? pieces * 4 : 0);
    a.moments = moments.data();
    if (any) {
        run_pieces(pieces, 3 * bytes, 0,
                   [&](std::int64_t first, std::int64_t last, char*) { kernels.output_moments(a, first, last); });
    }
    const std::vector<float> factors = rescale_factors(a, strengths);
    a.factor = factors.data();
    run_pieces(pieces, 11 * bytes, 0,
               [&](std::int64_t first, std::int64_t last, char*) { kernels.guided_step(a, first, last); });
}

void row_lora(const std::string& set, const at::Tensor& x, const at::Tensor& down, const at::Tensor& up,
              const at::Tensor& unit, const at::Tensor& scale, std::int64_t stride, std::int64_t padding,
              const std::vector<at::Tensor>& ys) {
    const auto parts = static_cast<std::int64_t>(ys.size());
    check_range("the number of parts", parts, 0, RowLora::most_parts + 1);
    if (x.dim() != 3 && x.dim() != 4) refuse("x has " + std::to_string(x.dim()) + " dimensions, not 3 or 4");
    if (down.dim() != 4 || up.dim() != 3) refuse("down must have 4 dimensions and up 3");
    if (unit.dim() != 3) refuse("unit has " + std::to_string(unit.dim()) + " dimensions, not 3");
    RowLora a{};
    a.type = float_of("x", x);
    const bool linear = x.dim() == 3;
    const std::int64_t rows = x.size(0), pool = down.size(0), taps = down.size(1), most = unit.size(2);
    a.in = x.size(linear ? 2 : 1), a.out = up.size(2);
    a.side = taps == 9 ? 3 : 1, a.stride = stride, a.padding = padding;
    if (taps != a.side * a.side || (linear && taps != 1)) refuse("down has " + std::to_string(taps) + " taps");
    check_range("stride", stride, 1, 3);
    check_range("padding", padding, 0, 2);
    a.x_height = linear ? 1 : x.size(2), a.x_width = linear ? x.size(1) : x.size(3);
    const auto reached = [&](std::int64_t size) {
        return std::max<std::int64_t>(0, (size + 2 * padding - a.side + stride) / stride);
    };
    a.height = linear ? 1 : reached(a.x_height), a.width = linear ? a.x_width : reached(a.x_width);
    const at::Tensor downs = contiguous("down", down, x.scalar_type(), {pool, taps, a.in, RowLora::rank});
    const at::Tensor ups = contiguous("up", up, x.scalar_type(), {pool, RowLora::rank, a.out});
    a.down = data_of(downs), a.up = data_of(ups);
    const std::vector<std::int64_t> sizes = linear ? std::vector<std::int64_t>{rows, a.width, a.out}
                                                   : std::vector<std::int64_t>{rows, a.out, a.height, a.width};
    for (const at::Tensor& y : ys) {
        check_sizes("y", y, sizes);
        if (y.scalar_type() != x.scalar_type()) refuse("y does not have x's type");
    }
    const at::Tensor numbers = contiguous("unit", unit, at::ScalarType::Long, {parts, rows, most});
    check_range("unit", numbers, -1, pool);
    const at::Tensor scales = contiguous("scale", scale, at::ScalarType::Float, {rows, most});
    if (a.height * a.width * a.out == 0) return;

    const LoraGroups groups(numbers, scales, a.height * a.width);
    if (groups.all().empty()) return;
    a.groups = groups.all().data();
    for (const RowLora::Group& group : groups.all()) {
        a.most = std::max(a.most, group.count());
        for (const std::int64_t count : group.counts) a.most_of_part = std::max(a.most_of_part, count);
    }

    at::Tensor input, outputs[RowLora::most_parts];
    a.x = pixels_of(x, input);
    for (std::int64_t part = 0; part < parts; ++part) a.ys[part] = pixels_of(ys[part], outputs[part]);
    const StreamingKernels& kernels = streaming_for(set);
    const std::int64_t pieces = groups.all().back().last, tokens = ceil_divide(groups.tokens(), pieces);
    const std::int64_t products = tokens * RowLora::rank * (taps * a.in + a.out) * a.most;
    run_pieces(
        pieces, products / kProductsPerByte, static_cast<std::size_t>(a.scratch()),
        [&](std::int64_t first, std::int64_t last, char* scratch) { kernels.row_lora(a, first, last, scratch); });
    for (std::int64_t part = 0; part < parts; ++part) {
        if (outputs[part].data_ptr() != ys[part].data_ptr()) ys[part].copy_(outputs[part]);
    }
}

}  // namespace stylefast
