// The only file that knows pybind11. Every call releases the GIL while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "operations.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

py::tuple plan_segments(const Int64Array& images, const Int64Array& branches, const Int64Array& offsets,
                        const Int64Array& reference_images, const Int64Array& reference_pages, std::int64_t min_width,
                        bool mutual) {
    const std::int64_t rows = images.size();
    const std::int64_t entries = reference_images.size();
    if (branches.size() != rows || offsets.size() != rows + 1 || reference_pages.size() != entries || min_width < 0) {
        throw std::invalid_argument("plan_segments: the arrays' lengths do not fit each other");
    }
    const std::int64_t* bounds = offsets.data();
    for (std::int64_t row = 0; row < rows; ++row) {
        if (bounds[row] > bounds[row + 1]) throw std::invalid_argument("plan_segments: offsets must not fall");
    }
    if (bounds[0] != 0 || bounds[rows] != entries) {
        throw std::invalid_argument("plan_segments: offsets must run from 0 to the number of references");
    }

    stylefast::Segments plan;
    {
        py::gil_scoped_release release;
        plan = stylefast::plan_segments(images.data(), branches.data(), rows, bounds, reference_images.data(),
                                        reference_pages.data(), min_width, mutual);
    }
    return py::make_tuple(Int64Array({rows, plan.width}, plan.page.data()), Int64Array(rows, plan.order.data()));
}

// an operation that computes without the GIL; the environment is read before, while Python can't change it
template <class... Arguments>
auto released(void (*operation)(const std::string&, Arguments...)) {
    return [operation](Arguments... arguments) {
        const std::string set = stylefast::instruction_set();
        py::gil_scoped_release release;
        operation(set, arguments...);
    };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "stylefast's C++ parts; call them through stylefast.runtime and stylefast.kernels";
    module.attr("interface") = 3;  // stylefast/_extension.py refuses any other number than its own
    module.def("plan_segments", &plan_segments, py::arg("images"), py::arg("branches"), py::arg("offsets"),
               py::arg("reference_images"), py::arg("reference_pages"), py::arg("min_width"), py::arg("mutual"));
    module.def("cpu_features", &stylefast::cpu_features);
    module.def("instruction_set", &stylefast::instruction_set);
    module.def("shared_attention", released(&stylefast::shared_attention), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("page"), py::arg("mode"), py::arg("scale"), py::arg("shift"), py::arg("gain"), py::arg("offset"),
               py::arg("pool_k"), py::arg("pool_v"), py::arg("pool_k_scale"), py::arg("pool_v_scale"), py::arg("bias"),
               py::arg("out"));
    module.def("gated_cross_attention", released(&stylefast::gated_cross_attention), py::arg("q"), py::arg("text_k"),
               py::arg("text_v"), py::arg("text_page"), py::arg("image_k"), py::arg("image_v"),
               py::arg("image_lengths"), py::arg("image_page"), py::arg("strength"), py::arg("group"),
               py::arg("masks"), py::arg("mask_index"), py::arg("out"));
    module.def("token_stats", released(&stylefast::token_stats), py::arg("xs"), py::arg("mean"), py::arg("variance"));
    module.def("adain_affine", released(&stylefast::adain_affine), py::arg("mean"), py::arg("variance"),
               py::arg("page"), py::arg("strength"), py::arg("pool_mean"), py::arg("pool_variance"), py::arg("gain"),
               py::arg("offset"));
    module.def("geglu", released(&stylefast::geglu), py::arg("x"), py::arg("out"));
    module.def("layer_norm", released(&stylefast::layer_norm), py::arg("x"), py::arg("weight"), py::arg("bias"),
               py::arg("eps"), py::arg("out"));
    module.def("add_layer_norm", released(&stylefast::add_layer_norm), py::arg("x"), py::arg("residual"),
               py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("total"), py::arg("out"));
    module.def("group_norm_silu", released(&stylefast::group_norm_silu), py::arg("x"), py::arg("groups"),
               py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("silu"), py::arg("page"),
               py::arg("pool_mean"), py::arg("pool_variance"), py::arg("pool_elements"), py::arg("out"));
    module.def("guided_step", released(&stylefast::guided_step), py::arg("latents"), py::arg("anchor"),
               py::arg("history"), py::arg("predictions"), py::arg("branch_rows"), py::arg("branch_weights"),
               py::arg("rescale"), py::arg("denoised"), py::arg("update"), py::arg("noise"), py::arg("next_latents"),
               py::arg("next_anchor"), py::arg("next_history"));
}
