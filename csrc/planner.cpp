#include "planner.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

namespace stylefast {
namespace {

constexpr std::int64_t kNone = -1;
constexpr std::int64_t kLive = -1;
constexpr std::int64_t kBranches = 4;
constexpr std::int64_t kBankPages = std::int64_t{1} << 31;

std::string row_name(std::int64_t image, std::int64_t branch) {
    return "image " + std::to_string(image) + ", branch " + std::to_string(branch);
}

void check_range(const char* name, const std::int64_t* values, std::int64_t count, std::int64_t low,
                 std::int64_t high) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (values[i] < low || values[i] >= high) {
            throw std::invalid_argument(std::string(name) + " hold " + std::to_string(values[i]) +
                                        ", but must be integers from " + std::to_string(low) + " to " +
                                        std::to_string(high - 1));
        }
    }
}

// the most references of a row
std::int64_t check(const Batch& batch, std::int64_t width) {
    const std::int64_t* offsets = batch.offsets;
    if (offsets[0] != 0 || offsets[batch.rows] != batch.entries) {
        throw std::invalid_argument("offsets must run from 0 to the number of references, " +
                                    std::to_string(batch.entries));
    }
    std::int64_t most = 0;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
        if (offsets[row] > offsets[row + 1]) throw std::invalid_argument("offsets must not fall");
        most = std::max(most, offsets[row + 1] - offsets[row]);
    }
    if (most > width) {
        throw std::invalid_argument("a row has " + std::to_string(most) + " references, but page has " +
                                    std::to_string(width) + " columns");
    }
    check_range("branches", batch.branches, batch.rows, 0, kBranches);
    check_range("bank pages", batch.reference_pages, batch.entries, kLive, kBankPages);
    return most;
}

}  // namespace

std::int64_t BatchPlanner::find_root(std::int64_t row) {
    while (parent_[row] != row) {
        parent_[row] = parent_[parent_[row]];
        row = parent_[row];
    }
    return row;
}

// the lower root wins, so that a set is known by its first row
void BatchPlanner::join(std::int64_t a, std::int64_t b) {
    a = find_root(a);
    b = find_root(b);
    parent_[std::max(a, b)] = std::min(a, b);
}

void BatchPlanner::index_rows(const Batch& batch) {
    by_image_.resize(static_cast<std::size_t>(batch.rows));
    std::iota(by_image_.begin(), by_image_.end(), 0);
    std::sort(by_image_.begin(), by_image_.end(), [&](std::int64_t a, std::int64_t b) {
        return std::tie(batch.images[a], batch.branches[a], a) < std::tie(batch.images[b], batch.branches[b], b);
    });
    std::int64_t first = kNone, second = std::numeric_limits<std::int64_t>::max();
    for (std::int64_t i = 1; i < batch.rows; ++i) {
        const std::int64_t a = by_image_[i - 1], b = by_image_[i];
        const bool same = batch.images[a] == batch.images[b] && batch.branches[a] == batch.branches[b];
        if (same && b < second) std::tie(first, second) = std::tie(a, b);
    }
    if (first != kNone) {
        throw std::invalid_argument("rows " + std::to_string(first) + " and " + std::to_string(second) + " are both " +
                                    row_name(batch.images[first], batch.branches[first]) +
                                    "; a batch holds each image and branch once");
    }
}

std::int64_t BatchPlanner::find_row(const Batch& batch, std::int64_t image, std::int64_t branch) const {
    const auto found = std::lower_bound(by_image_.begin(), by_image_.end(), kNone, [&](std::int64_t row, std::int64_t) {
        return std::tie(batch.images[row], batch.branches[row]) < std::tie(image, branch);
    });
    if (found == by_image_.end() || batch.images[*found] != image || batch.branches[*found] != branch) return kNone;
    return *found;
}

void BatchPlanner::resolve(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page) {
    parent_.resize(static_cast<std::size_t>(batch.rows));
    std::iota(parent_.begin(), parent_.end(), 0);
    readers_.clear();
    std::fill(page, page + batch.rows * width, kNone);
    for (std::int64_t row = 0; row < batch.rows; ++row) {
        for (std::int64_t entry = batch.offsets[row]; entry < batch.offsets[row + 1]; ++entry) {
            std::int64_t& own = page[row * width + entry - batch.offsets[row]];
            if (batch.reference_pages[entry] != kLive) {
                own = batch.rows + batch.reference_pages[entry];
                readers_.emplace_back(own, row);
                continue;
            }
            const std::int64_t image = batch.reference_images[entry], branch = batch.branches[row];
            own = find_row(batch, image, branch);
            if (own == kNone) {
                throw std::invalid_argument("row " + std::to_string(row) + " refers to " + row_name(image, branch) +
                                            ", which has no row in this batch; add it or bake the reference");
            }
            if (!mutual && batch.offsets[own + 1] > batch.offsets[own]) {
                throw std::invalid_argument("row " + std::to_string(row) + " refers to " + row_name(image, branch) +
                                            ", which refers to another page itself; references can't be chained");
            }
            join(own, row);
        }
    }
    std::sort(readers_.begin(), readers_.end());
    for (std::size_t i = 1; i < readers_.size(); ++i) {
        if (readers_[i - 1].first == readers_[i].first) join(readers_[i - 1].second, readers_[i].second);
    }
}

// sets of rows that share pages, by their first row; within a set, rows of equal pages side by side
void BatchPlanner::arrange(std::int64_t rows, std::int64_t width, const std::int64_t* page, std::int64_t* order) {
    for (std::int64_t row = 0; row < rows; ++row) parent_[row] = find_root(row);
    std::iota(order, order + rows, 0);
    std::sort(order, order + rows, [&](std::int64_t a, std::int64_t b) {
        if (parent_[a] != parent_[b]) return parent_[a] < parent_[b];
        const std::int64_t *own = page + a * width, *other = page + b * width;
        const auto [x, y] = std::mismatch(own, own + width, other);
        return x == own + width ? a < b : *x < *y;
    });
}

std::int64_t BatchPlanner::plan(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page,
                                std::int64_t* order) {
    const std::int64_t most = check(batch, width);
    index_rows(batch);
    resolve(batch, mutual, width, page);
    arrange(batch.rows, width, page, order);
    return most;
}

}  // namespace stylefast
