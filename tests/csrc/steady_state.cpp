// Exits with 1 if planner, page pool or copies allocate memory once they are warm. With an argument the program
// allocates once a round itself, which must be noticed.
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/copies.h"
#include "../../csrc/page_pool.h"
#include "../../csrc/planner.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

void note() {
    if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

// every operator new of the C++ library ends here too
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t bytes) {
    note();
    return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) {
    note();
    return __libc_calloc(count, bytes);
}
void* realloc(void* data, std::size_t bytes) {
    note();
    return __libc_realloc(data, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) {
    note();
    return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** data, std::size_t alignment, std::size_t bytes) {
    *data = memalign(alignment, bytes);
    return *data ? 0 : ENOMEM;
}
}

namespace {

constexpr std::int64_t kRows = 48, kWidth = 3, kSlots = 64, kPages = 24, kChunks = 40, kChunkBytes = 256;

class Mix {
  public:
    Mix() : pool_(kSlots), blocks_(2 * kChunks * kChunkBytes) {}

    void round(bool largest) {
        plan(largest ? kRows : below(kRows + 1), largest);
        use_pages();
        copy(largest ? kChunks : below(kChunks + 1));
    }

  private:
    std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(random_() % limit); }

    // the first rows are references of the others; every target takes up to kWidth of them or pages of the bank
    void plan(std::int64_t rows, bool largest) {
        std::int64_t entries = 0;
        const std::int64_t references = rows / 4;
        for (std::int64_t row = 0; row < rows; ++row) {
            pictures_[row] = row < references ? row : 1000 - row;
            branches_[row] = 3;
            offsets_[row] = entries;
            const std::int64_t own = row < references ? 0 : largest ? kWidth : below(kWidth + 1);
            for (std::int64_t i = 0; i < own; ++i) {
                reference_pictures_[entries] = references > 0 ? below(references) : 0;
                reference_pages_[entries++] = references > 0 && !largest ? below(9) - 1 : below(8);
            }
        }
        offsets_[rows] = entries;
        const stylefast::Batch batch{pictures_,        branches_, offsets_, reference_pictures_,
                                     reference_pages_, rows,      entries};
        planner_.plan(batch, false, kWidth, page_, order_);
    }

    void draw_keys() {
        for (std::int64_t i = 0; i < 4 * kPages; i += 4) {
            const std::int64_t values[] = {below(5), below(20), below(2), 0};
            for (std::int64_t part = 0; part < 4; ++part) keys_[i + part] = values[part];
        }
    }

    std::int64_t collect_claims() {
        std::int64_t count = 0;
        for (std::int64_t i = 0; i < kPages; ++i) {
            if (claimed_[i]) loading_[count++] = slots_[i];
        }
        return count;
    }

    void use_pages() {
        draw_keys();
        pool_.acquire(keys_, kPages, slots_, claimed_);
        pool_.filled(loading_, collect_claims());
        pool_.wait(slots_, kPages, std::chrono::milliseconds(0));
        if (below(8) == 0) pool_.drop(below(5));
        pool_.release(keys_, kPages);
        draw_keys();
        pool_.prefetch(keys_, kPages, slots_, claimed_);
        const std::int64_t claims = collect_claims();
        if (below(8) == 0) {
            pool_.failed(loading_, claims);
        } else {
            pool_.filled(loading_, claims);
        }
        pool_.stats();
    }

    void copy(std::int64_t chunks) {
        for (std::int64_t i = 0; i < chunks; ++i) {
            const auto address = reinterpret_cast<std::int64_t>(blocks_.data()) + i * kChunkBytes;
            sources_[i] = address;
            destinations_[i] = address + kChunks * kChunkBytes;
            bytes_[i] = below(kChunkBytes + 1);
            files_[i] = -1;
        }
        stylefast::copy_blocks(sources_, destinations_, bytes_, files_, chunks);
    }

    std::mt19937 random_{7};
    stylefast::BatchPlanner planner_;
    stylefast::PagePool pool_;
    std::vector<char> blocks_;
    std::int64_t pictures_[kRows], branches_[kRows], offsets_[kRows + 1], order_[kRows], page_[kRows * kWidth];
    std::int64_t reference_pictures_[kRows * kWidth], reference_pages_[kRows * kWidth];
    std::int64_t keys_[4 * kPages], slots_[kPages], loading_[kPages];
    bool claimed_[kPages];
    std::int64_t sources_[kChunks], destinations_[kChunks], bytes_[kChunks];
    std::int32_t files_[kChunks];
};

}  // namespace

int main(int arguments, char**) {
    Mix mix;
    for (int i = 0; i < 100; ++i) mix.round(true);
    counting = true;
    const int rounds = arguments > 1 ? 100 : 10000;
    for (int i = 0; i < rounds; ++i) {
        mix.round(false);
        if (arguments > 1) delete new volatile int(i);
    }
    counting = false;
    std::printf("%ld allocations in %d rounds\n", allocations.load(), rounds);
    return allocations.load() == 0 ? 0 : 1;
}
