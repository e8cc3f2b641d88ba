// Spreads work over torch's threads. How it is cut never changes a result: kernels see single units or pieces.
#pragma once

#include <ATen/Parallel.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace stylefast {

constexpr std::int64_t kBytesPerThread = 128 << 10;                   // below that a thread costs more than it brings
constexpr std::int64_t kLeastRange = 64 << 10, kMostRange = 8 << 20;  // bytes
constexpr std::int64_t kRangesPerThread = 8;
constexpr std::int64_t kLeastHuge = 4 << 20;  // bytes

// Asks for huge pages under a large output. Memory that a program has just got from the system is otherwise given page
// by page at the first write, which takes longer than any operation here.
inline void prefer_huge_pages(void* data, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t page = 4096;
    if (bytes < kLeastHuge) return;
    const auto from = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (from + page - 1) / page * page, last = (from + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: its failure changes no result
#endif
}

// Scratch of the calling thread. It only grows, so that small calls don't pay for fresh pages of memory.
inline char* thread_scratch(std::size_t bytes) {
    struct Free {
        void operator()(char* data) const { ::operator delete(data, std::align_val_t(64)); }
    };
    thread_local std::unique_ptr<char, Free> buffer;
    thread_local std::size_t size = 0;
    if (size < bytes) {
        buffer.reset();
        size = 0;
        buffer.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
        size = bytes;
    }
    return buffer.get();
}

// Units are taken one by one: rows differ in how many tokens they see, so equal shares would not end together.
template <class Run>
void run_units(std::int64_t units, std::int64_t most_workers, std::size_t scratch, const Run& run) {
    std::atomic<std::int64_t> next{0};
    const std::int64_t workers = std::min({static_cast<std::int64_t>(at::get_num_threads()), units, most_workers});
    at::parallel_for(0, workers, 1, [&](std::int64_t, std::int64_t) {
        char* const mine = scratch ? thread_scratch(scratch) : nullptr;
        for (std::int64_t unit = next++; unit < units; unit = next++) run(unit, mine);
    });
}

// run(first, last, scratch) over ranges of pieces that move `bytes` each
template <class Run>
void run_pieces(std::int64_t pieces, std::int64_t bytes, std::size_t scratch, const Run& run) {
    const std::int64_t each = std::max<std::int64_t>(1, bytes);
    const std::int64_t threads = at::get_num_threads();
    const std::int64_t workers = std::clamp<std::int64_t>(pieces * each / kBytesPerThread, 1, threads);
    if (workers == 1) return run(0, pieces, scratch ? thread_scratch(scratch) : nullptr);
    const std::int64_t share = pieces * each / (kRangesPerThread * workers);
    const std::int64_t range = std::max<std::int64_t>(1, std::clamp(share, kLeastRange, kMostRange) / each);
    run_units((pieces + range - 1) / range, workers, scratch,
              [&](std::int64_t unit, char* mine) { run(unit * range, std::min(pieces, (unit + 1) * range), mine); });
}

}  // namespace stylefast
