// The only file that knows pybind11. Every call releases the GIL while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "copies.h"
#include "cpu_features.h"
#include "operations.h"
#include "page_pool.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;
using ReleasedGil = py::call_guard<py::gil_scoped_release>;

bool plan(stylefast::BatchPlanner& planner, const Int64Array& pictures, const Int64Array& branches,
          const Int64Array& offsets, const Int64Array& reference_pictures, const Int64Array& reference_pages,
          Int64Array& page, Int64Array& order, bool mutual) {
    const stylefast::Batch batch{pictures.data(),           branches.data(),        offsets.data(),
                                 reference_pictures.data(), reference_pages.data(), pictures.size(),
                                 reference_pictures.size()};
    const std::int64_t width = page.shape(1);
    std::int64_t *const page_data = page.mutable_data(), *const order_data = order.mutable_data();
    const py::gil_scoped_release release;
    return planner.plan(batch, mutual, width, page_data, order_data);
}

py::tuple acquire_pages(stylefast::PagePool& pool, const Int64Array& keys) {
    Int64Array slots(keys.shape(0));
    BoolArray claimed(keys.shape(0));
    std::int64_t* const slot_data = slots.mutable_data();
    bool* const claimed_data = claimed.mutable_data();
    std::int64_t absent;
    {
        const py::gil_scoped_release release;
        absent = pool.acquire(keys.data(), keys.shape(0), slot_data, claimed_data);
    }
    return py::make_tuple(slots, claimed, absent);
}

py::tuple prefetch_pages(stylefast::PagePool& pool, const Int64Array& keys) {
    Int64Array slots(keys.shape(0));
    BoolArray claimed(keys.shape(0));
    std::int64_t* const slot_data = slots.mutable_data();
    bool* const claimed_data = claimed.mutable_data();
    {
        const py::gil_scoped_release release;
        pool.prefetch(keys.data(), keys.shape(0), slot_data, claimed_data);
    }
    return py::make_tuple(slots, claimed);
}

template <auto report>
std::int64_t report_pages(stylefast::PagePool& pool, const Int64Array& slots_or_keys) {
    const py::gil_scoped_release release;
    return (pool.*report)(slots_or_keys.data(), slots_or_keys.shape(0));
}

bool wait_for_pages(stylefast::PagePool& pool, const Int64Array& slots) {
    for (;;) {
        stylefast::WaitResult result;
        {
            const py::gil_scoped_release release;
            result = pool.wait(slots.data(), slots.size(), std::chrono::milliseconds(100));
        }
        if (result != stylefast::WaitResult::kPending) return result == stylefast::WaitResult::kReady;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // such as Ctrl-C
    }
}

py::tuple pool_stats(const stylefast::PagePool& pool) {
    stylefast::PoolStats stats;
    {
        const py::gil_scoped_release release;
        stats = pool.stats();
    }
    return py::make_tuple(stats.slots, stats.resident, stats.loading, stats.pinned, stats.hits, stats.misses,
                          stats.evictions);
}

py::object list_pages(const stylefast::PagePool& pool) {
    Int64Array rows({pool.slots(), stylefast::PagePool::kColumns});
    std::int64_t* const data = rows.mutable_data();
    std::int64_t count = 0;
    {
        const py::gil_scoped_release release;
        count = pool.list(data);
    }
    return rows[py::slice(0, count, 1)];
}

py::tuple copy(const Int64Array& sources, const Int64Array& destinations, const Int64Array& bytes,
               const Int32Array& files) {
    const auto count = sources.size();
    if (destinations.size() != count || bytes.size() != count || files.size() != count) {
        throw std::invalid_argument("the arrays' lengths do not fit each other");
    }
    stylefast::CopyFailure failure;
    {
        const py::gil_scoped_release release;
        failure = stylefast::copy_blocks(sources.data(), destinations.data(), bytes.data(), files.data(), count);
    }
    return py::make_tuple(failure.index, failure.reason);
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

void bind_runtime(py::module_& module) {
    using stylefast::BatchPlanner, stylefast::PagePool;
    py::class_<BatchPlanner>(module, "BatchPlanner")
        .def(py::init<>())
        .def("plan", &plan, py::arg("pictures"), py::arg("branches"), py::arg("offsets"), py::arg("reference_pictures"),
             py::arg("reference_pages"), py::arg("page").noconvert(), py::arg("order").noconvert(), py::arg("mutual"));

    py::class_<PagePool>(module, "PagePool")
        .def(py::init<std::int64_t>(), py::arg("slots"))
        .def("acquire", &acquire_pages, py::arg("keys"))
        .def("prefetch", &prefetch_pages, py::arg("keys"))
        .def("filled", &report_pages<&PagePool::filled>, py::arg("slots"))
        .def("failed", &report_pages<&PagePool::failed>, py::arg("slots"))
        .def("unpinned", &report_pages<&PagePool::unpinned>, py::arg("slots"))
        .def("wait", &wait_for_pages, py::arg("slots"))
        .def("release", &report_pages<&PagePool::release>, py::arg("keys"))
        .def("drop", &PagePool::drop, py::arg("style"), ReleasedGil())
        .def("clear", &PagePool::clear, ReleasedGil())
        .def("stats", &pool_stats)
        .def("pages", &list_pages);

    module.def("copy_blocks", &copy, py::arg("sources"), py::arg("destinations"), py::arg("bytes"), py::arg("files"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "stylefast's C++ parts; call them through stylefast.runtime and stylefast.kernels";
    module.attr("interface") = 10;  // stylefast/_extension.py refuses any other number than its own
    bind_runtime(module);
    module.def("cpu_features", &stylefast::cpu_features);
    module.def("instruction_set", &stylefast::instruction_set);
    module.def("shared_attention", released(&stylefast::shared_attention), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("page"), py::arg("mode"), py::arg("scale"), py::arg("shift"), py::arg("bias"), py::arg("gain"),
               py::arg("offset"), py::arg("pool_k"), py::arg("pool_v"), py::arg("pool_k_scale"),
               py::arg("pool_v_scale"), py::arg("out"));
    module.def("gated_cross_attention", released(&stylefast::gated_cross_attention), py::arg("q"), py::arg("text_k"),
               py::arg("text_v"), py::arg("text_page"), py::arg("text_lengths"), py::arg("image_k"), py::arg("image_v"),
               py::arg("image_lengths"), py::arg("image_page"), py::arg("strength"), py::arg("group"), py::arg("masks"),
               py::arg("mask_index"), py::arg("out"));
    module.def("token_stats", released(&stylefast::token_stats), py::arg("xs"), py::arg("mean"), py::arg("variance"));
    module.def("adain_affine", released(&stylefast::adain_affine), py::arg("mean"), py::arg("variance"),
               py::arg("page"), py::arg("strength"), py::arg("pool_mean"), py::arg("pool_variance"), py::arg("gain"),
               py::arg("offset"));
    module.def("dequantise", released(&stylefast::dequantise), py::arg("scale"), py::arg("values"), py::arg("out"));
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
    module.def("row_lora", released(&stylefast::row_lora), py::arg("x"), py::arg("down"), py::arg("up"),
               py::arg("unit"), py::arg("scale"), py::arg("stride"), py::arg("padding"), py::arg("ys"));
}
