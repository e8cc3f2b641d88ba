#include "arguments.h"

#include <sstream>
#include <stdexcept>

namespace stylefast {

void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t end) {
    if (value < low || value >= end) {
        refuse(std::string(name) + " is " + std::to_string(value) + ", but it must be from " + std::to_string(low) +
               " to " + std::to_string(end - 1));
    }
}

void check_range(const char* name, const at::Tensor& values, std::int64_t low, std::int64_t end) {
    const std::int64_t* data = values.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < values.numel(); ++i) check_range(name, data[i], low, end);
}

void check_sizes(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
    if (x.sizes() == sizes) return;
    std::ostringstream message;
    message << name << " does not have the shape that the other tensors ask for: " << x.sizes() << " instead of "
            << sizes;
    refuse(message.str());
}

const at::Tensor& need(const char* name, const OptionalTensor& x) {
    if (!x) refuse(std::string(name) + " is missing");
    return *x;
}

Element element_of(const char* name, const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::ScalarType::Float: return Element::f32;
        case at::ScalarType::BFloat16: return Element::bf16;
        case at::ScalarType::Half: return Element::f16;
        case at::ScalarType::Float8_e4m3fn: return Element::f8;
        default: refuse(std::string(name) + " is " + c10::toString(x.scalar_type()) + ", which no kernel takes");
    }
}

Tokens tokens_of(const char* name, const at::Tensor& x) {
    if (x.dim() != 4) refuse(std::string(name) + " has " + std::to_string(x.dim()) + " dimensions, not 4");
    if (x.stride(3) != 1 && x.size(3) > 1) {
        refuse(std::string(name) + " has stride " + std::to_string(x.stride(3)) + " between channels, not 1");
    }
    const std::int64_t size = x.element_size();
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    return {data, element_of(name, x), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}

Tokens tokens_like(const char* name, const at::Tensor& x, at::IntArrayRef sizes, const Tokens& like) {
    check_sizes(name, x, sizes);
    const Tokens tokens = tokens_of(name, x);
    if (tokens.type != like.type) refuse(std::string(name) + " does not have the type that the other tensors ask for");
    return tokens;
}

at::Tensor contiguous(const char* name, const at::Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
    if (x.scalar_type() != type) refuse(std::string(name) + " must be " + c10::toString(type));
    check_sizes(name, x, sizes);
    return x.contiguous();
}

at::Tensor channels_side_by_side(const char* name, const at::Tensor& x, std::int64_t dims) {
    if (x.scalar_type() != at::ScalarType::Float || x.dim() != dims) {
        refuse(std::string(name) + " must be fp32 with " + std::to_string(dims) + " dimensions");
    }
    return x.stride(dims - 1) == 1 ? x : x.contiguous();
}

Channels channels_of(const at::Tensor& x) {
    const std::int64_t d = x.dim();
    return {static_cast<float*>(const_cast<void*>(x.const_data_ptr())), d == 4 ? x.stride(0) : 0, x.stride(d - 3),
            x.stride(d - 2)};
}

}  // namespace stylefast
