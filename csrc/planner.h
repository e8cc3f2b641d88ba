// Which rows of a batch read whose keys and values. Free of any framework. stylefast/runtime/steps/step_buffers.py
// checks arguments, words errors and has the plain reference.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace stylefast {

// The references of row r are entries offsets[r] to offsets[r + 1] of reference_pictures and reference_pages.
struct Batch {
    const std::int64_t* pictures;            // [rows]
    const std::int64_t* branches;            // [rows], 0 to 3
    const std::int64_t* offsets;             // [rows + 1]
    const std::int64_t* reference_pictures;  // [entries]
    const std::int64_t* reference_pages;     // [entries], -1: the row of that picture in the same branch
    std::int64_t rows, entries;
};

// Keeps its scratch from batch to batch, so that it stops allocating once it has seen the largest one. For one thread
// at a time.
class BatchPlanner {
  public:
    // Fills page [rows, width] (-1 where a row has no further reference) and order [rows], a permutation of the rows.
    // A page of the bank (reference_pages >= 0) becomes rows + page. Trusts that offsets rise from 0 to entries by at
    // most width. Returns false, with page and order in any state, for two rows of one picture and branch, a reference
    // without a row in the branch, and, unless mutual, a reference that has references itself.
    bool plan(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page, std::int64_t* order);

  private:
    bool index_rows(const Batch& batch);
    std::int64_t find_row(const Batch& batch, std::int64_t picture, std::int64_t branch) const;
    bool resolve(const Batch& batch, bool mutual, std::int64_t width, std::int64_t* page);
    void arrange(std::int64_t rows, std::int64_t width, const std::int64_t* page, std::int64_t* order);
    std::int64_t find_root(std::int64_t row);
    void join(std::int64_t a, std::int64_t b);

    std::vector<std::int64_t> by_picture_;                        // rows by (picture, branch)
    std::vector<std::int64_t> parent_;                            // of each row, in the forest of rows that share pages
    std::vector<std::pair<std::int64_t, std::int64_t>> readers_;  // (bank page, row that reads it)
};

}  // namespace stylefast
