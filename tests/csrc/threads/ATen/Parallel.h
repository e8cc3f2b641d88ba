// In place of torch's header: the same two functions on threads that a sanitizer sees. OpenMP's it does not, and would
// take what OpenMP orders for races.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int get_num_threads() { return 4; }

template <class Run>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const Run& run) {
    const std::int64_t count = std::min<std::int64_t>(get_num_threads(), (end - begin + grain - 1) / grain);
    if (count <= 1) return run(begin, end);
    const std::int64_t each = (end - begin + count - 1) / count;
    std::vector<std::thread> threads;
    for (std::int64_t i = 1; i < count; ++i) {
        threads.emplace_back([&, i] {
            const std::int64_t first = begin + i * each;
            if (first < end) run(first, std::min(end, first + each));
        });
    }
    run(begin, std::min(end, begin + each));
    for (std::thread& thread : threads) thread.join();
}

}  // namespace at
