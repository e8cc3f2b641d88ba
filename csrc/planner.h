// Which rows of a batch read whose keys and values. Free of any framework; the twin in Python is
// stylefast/runtime/planner.py, and the tests hold the two equal, messages included.
#pragma once

#include <cstdint>
#include <vector>

namespace stylefast {

struct Segments {
    std::int64_t width = 0;           // columns of page
    std::vector<std::int64_t> page;   // rows x width, row-major; -1 where a row has no further reference
    std::vector<std::int64_t> order;  // a permutation of the rows
};

// The references of row r are entries offsets[r] to offsets[r + 1] of reference_images and reference_pages.
// A page of the bank (reference_pages >= 0) becomes rows + page; otherwise the row that holds the reference's image in
// the branch of row r. At least min_width columns are written.
// Throws std::invalid_argument for two rows of one image and branch, for a reference without a row in the branch, and,
// unless mutual, for a reference that has references itself.
Segments plan_segments(const std::int64_t* images, const std::int64_t* branches, std::int64_t rows,
                       const std::int64_t* offsets, const std::int64_t* reference_images,
                       const std::int64_t* reference_pages, std::int64_t min_width, bool mutual);

}  // namespace stylefast
