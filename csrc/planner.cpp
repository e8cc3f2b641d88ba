#include "planner.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace stylefast {
namespace {

constexpr std::int64_t kNone = -1;
constexpr std::int64_t kLive = -1;

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

bool BatchPlanner::index_rows(const Batch& batch) {
    by_picture_.resize(static_cast<std::size_t>(batch.rows));
    std::iota(by_picture_.begin(), by_picture_.end(), 0);
    std::sort(by_picture_.begin(), by_picture_.end(), [&](std::int64_t a, std::int64_t b) {
        return std::tie(batch.pictures[a], batch.branches[a], a) < std::tie(batch.pictures[b], batch.branches[b], b);
    });
    const auto same = [&](std::int64_t a, std::int64_t b) {
        return batch.pictures[a] == batch.pictures[b] && batch.branches[a] == batch.branches[b];
    };
    return std::adjacent_find(by_picture_.begin(), by_picture_.end(), same) == by_picture_.end();
}

std::int64_t BatchPlanner::find_row(const Batch& batch, std::int64_t picture, std::int64_t branch) const {
    const auto found =
        std::lower_bound(by_picture_.begin(), by_picture_.end(), kNone, [&](std::int64_t row, std::int64_t) {
            return std::tie(batch.pictures[row], batch.branches[row]) < std::tie(picture, branch);
        });
    if (found == by_picture_.end() || batch.pictures[*found] != picture || batch.branches[*found] != branch)
        return kNone;
    return *found;
}

bool BatchPlanner::resolve(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page) {
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
            own = find_row(batch, batch.reference_pictures[entry], batch.branches[row]);
            if (own == kNone || (!mutual && batch.offsets[own + 1] > batch.offsets[own])) return false;
            join(own, row);
        }
    }
    std::sort(readers_.begin(), readers_.end());
    for (std::size_t i = 1; i < readers_.size(); ++i) {
        if (readers_[i - 1].first == readers_[i].first) join(readers_[i - 1].second, readers_[i].second);
    }
    return true;
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

bool BatchPlanner::plan(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page, std::int64_t* order) {
    if (!index_rows(batch) || !resolve(batch, mutual, width, page)) return false;
    arrange(batch.rows, width, page, order);
    return true;
}

}  // namespace stylefast
