#include "planner.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace stylefast {
namespace {

constexpr std::int64_t kNone = -1;

std::string row_name(std::int64_t image, std::int64_t branch) {
    return "image " + std::to_string(image) + ", branch " + std::to_string(branch);
}

std::int64_t find_root(std::vector<std::int64_t>& parent, std::int64_t node) {
    while (parent[node] != node) {
        parent[node] = parent[parent[node]];
        node = parent[node];
    }
    return node;
}

// the lower root wins, so that a set is known by its first row
void join(std::vector<std::int64_t>& parent, std::int64_t a, std::int64_t b) {
    a = find_root(parent, a);
    b = find_root(parent, b);
    parent[std::max(a, b)] = std::min(a, b);
}

}  // namespace

Segments plan_segments(const std::int64_t* images, const std::int64_t* branches, std::int64_t rows,
                       const std::int64_t* offsets, const std::int64_t* reference_images,
                       const std::int64_t* reference_pages, std::int64_t min_width, bool mutual) {
    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> row_of;
    Segments plan;
    plan.width = min_width;
    for (std::int64_t row = 0; row < rows; ++row) {
        const auto [found, inserted] = row_of.emplace(std::make_pair(images[row], branches[row]), row);
        if (!inserted) {
            throw std::invalid_argument("rows " + std::to_string(found->second) + " and " + std::to_string(row) +
                                        " are both " + row_name(images[row], branches[row]) +
                                        "; a batch holds each image and branch once");
        }
        plan.width = std::max(plan.width, offsets[row + 1] - offsets[row]);
    }

    plan.page.assign(static_cast<std::size_t>(rows * plan.width), kNone);
    std::vector<std::int64_t> parent(static_cast<std::size_t>(rows));
    std::iota(parent.begin(), parent.end(), 0);
    std::unordered_map<std::int64_t, std::int64_t> first_reader;  // bank page -> the first row that reads it
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t entry = offsets[row]; entry < offsets[row + 1]; ++entry) {
            std::int64_t& page = plan.page[row * plan.width + entry - offsets[row]];
            if (reference_pages[entry] >= 0) {
                page = rows + reference_pages[entry];
                join(parent, first_reader.emplace(page, row).first->second, row);
                continue;
            }
            const auto found = row_of.find({reference_images[entry], branches[row]});
            if (found == row_of.end()) {
                throw std::invalid_argument("row " + std::to_string(row) + " refers to " +
                                            row_name(reference_images[entry], branches[row]) +
                                            ", which has no row in this batch; add it or bake the reference");
            }
            page = found->second;
            if (!mutual && offsets[page + 1] > offsets[page]) {
                throw std::invalid_argument("row " + std::to_string(row) + " refers to " +
                                            row_name(reference_images[entry], branches[row]) +
                                            ", which refers to another page itself; references can't be chained");
            }
            join(parent, page, row);
        }
    }

    // sets of rows that share pages, by their first row; within a set, rows of equal pages side by side
    std::vector<std::int64_t> root(static_cast<std::size_t>(rows));
    for (std::int64_t row = 0; row < rows; ++row) root[row] = find_root(parent, row);
    plan.order.resize(static_cast<std::size_t>(rows));
    std::iota(plan.order.begin(), plan.order.end(), 0);
    std::stable_sort(plan.order.begin(), plan.order.end(), [&](std::int64_t a, std::int64_t b) {
        if (root[a] != root[b]) return root[a] < root[b];
        const auto first = plan.page.begin();
        return std::lexicographical_compare(first + a * plan.width, first + (a + 1) * plan.width,
                                            first + b * plan.width, first + (b + 1) * plan.width);
    });
    return plan;
}

}  // namespace stylefast
