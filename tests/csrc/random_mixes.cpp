// Threads that take, fill, prefetch, drop and release pages of one pool and copy what they take. What lies in a
// pinned page is checked against its key. Built with sanitizers; exits with 1 at the first wrong byte or count.
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/copies.h"
#include "../../csrc/page_pool.h"
#include "../../csrc/planner.h"

using stylefast::BatchPlanner;
using stylefast::PagePool;
using stylefast::WaitResult;

namespace {

constexpr std::int64_t kStyles = 4, kSteps = 6, kBranches = 2, kKeys = kStyles * kSteps * kBranches;
constexpr std::int64_t kSlots = 18, kWords = 61, kMost = 6, kWorkers = 4, kRounds = 2500;

void demand(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::_Exit(1);
}

struct Scene {
    PagePool pool{kSlots};
    std::vector<std::int64_t> store = std::vector<std::int64_t>(kKeys * kWords);    // what every page holds
    std::vector<std::int64_t> blocks = std::vector<std::int64_t>(kSlots * kWords);  // the slots
    std::atomic<bool> ended{false};
    std::atomic<long> refused{0}, broken{0};

    Scene() {
        for (std::size_t i = 0; i < store.size(); ++i) store[i] = static_cast<std::int64_t>(i * 7919);
    }
};

class Worker {
  public:
    Worker(Scene& scene, unsigned seed) : scene_(scene), random_(seed) {}

    void read() {
        for (std::int64_t i = 0; i < kRounds; ++i) {
            const std::int64_t count = draw();
            if (scene_.pool.acquire(keys_, count, slots_, claimed_) > 0) {
                ++scene_.refused;
                std::this_thread::yield();
                continue;
            }
            load(count);
            if (wait(count)) {
                check(count);
            } else {
                ++scene_.broken;
            }
            demand(scene_.pool.unpinned(slots_, count) == -1, "the pins of pages");
            demand(scene_.pool.release(keys_, count) == -1, "the return of pins");
            plan();
        }
    }

    void prefetch() {
        while (!scene_.ended) {
            const std::int64_t count = draw();
            scene_.pool.prefetch(keys_, count, slots_, claimed_);
            load(count);
        }
    }

    void drop() {
        std::vector<std::int64_t> rows(kSlots * PagePool::kColumns);
        while (!scene_.ended) {
            demand(scene_.pool.drop(below(kStyles)) <= kSlots, "the pages that a drop leaves");
            if (below(20) == 0) scene_.pool.clear();
            const stylefast::PoolStats stats = scene_.pool.stats();
            demand(stats.resident + stats.loading <= kSlots && stats.pinned <= kSlots, "the counts of pages");
            demand(scene_.pool.list(rows.data()) <= kSlots, "the number of pages");
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }

  private:
    std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(random_() % limit); }

    std::int64_t draw() {
        const std::int64_t count = 1 + below(kMost);
        for (std::int64_t i = 0; i < count; ++i) {
            numbers_[i] = below(kKeys);
            const std::int64_t values[] = {numbers_[i] % kStyles, numbers_[i] / kStyles % kSteps,
                                           numbers_[i] / kStyles / kSteps, 0};
            for (std::int64_t part = 0; part < 4; ++part) keys_[4 * i + part] = values[part];
        }
        return count;
    }

    // copies what was claimed; one load in sixteen breaks
    void load(std::int64_t count) {
        std::int64_t sources[kMost], destinations[kMost], bytes[kMost], loading[kMost], chunks = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            if (!claimed_[i]) continue;
            sources[chunks] = reinterpret_cast<std::int64_t>(&scene_.store[numbers_[i] * kWords]);
            destinations[chunks] = reinterpret_cast<std::int64_t>(&scene_.blocks[slots_[i] * kWords]);
            bytes[chunks] = kWords * sizeof(std::int64_t);
            loading[chunks++] = slots_[i];
        }
        const std::int32_t files[kMost] = {-1, -1, -1, -1, -1, -1};
        demand(stylefast::copy_blocks(sources, destinations, bytes, files, chunks).index == -1, "a copy");
        const bool breaks = below(16) == 0;
        for (std::int64_t i = 0; i < chunks; ++i) {
            if (breaks) {
                scene_.pool.failed(loading + i, 1);
            } else {
                scene_.pool.filled(loading + i, 1);
            }
        }
    }

    bool wait(std::int64_t count) {
        for (;;) {
            const WaitResult result = scene_.pool.wait(slots_, count, std::chrono::milliseconds(20));
            if (result != WaitResult::kPending) return result == WaitResult::kReady;
        }
    }

    void check(std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) {
            for (std::int64_t word = 0; word < kWords; ++word) {
                demand(scene_.blocks[slots_[i] * kWords + word] == scene_.store[numbers_[i] * kWords + word],
                       "the content of a page");
            }
        }
    }

    void plan() {
        const std::int64_t rows = 2 + below(6);
        std::int64_t pictures[8], branches[8] = {}, offsets[9] = {}, references[8] = {}, pages[8], page[8], order[8];
        for (std::int64_t row = 0; row < rows; ++row) {
            pictures[row] = 10 - row;
            offsets[row + 1] = row;
            references[row] = 10;
            pages[row] = below(3) - 1;
        }
        demand(planner_.plan({pictures, branches, offsets, references, pages, rows, rows - 1}, false, 1, page, order),
               "a plan");
        std::int64_t sum = 0;
        for (std::int64_t row = 0; row < rows; ++row) sum += order[row];
        demand(sum == rows * (rows - 1) / 2, "the order of the rows");
    }

    Scene& scene_;
    std::mt19937 random_;
    BatchPlanner planner_;
    std::int64_t numbers_[kMost], keys_[4 * kMost], slots_[kMost];
    bool claimed_[kMost];
};

}  // namespace

int main() {
    alarm(120);  // a deadlock ends with an error
    Scene scene;
    std::vector<std::thread> readers, others;
    others.emplace_back([&] { Worker(scene, 100).prefetch(); });
    others.emplace_back([&] { Worker(scene, 200).drop(); });
    for (unsigned i = 0; i < kWorkers; ++i) readers.emplace_back([&scene, i] { Worker(scene, i).read(); });
    for (std::thread& reader : readers) reader.join();
    scene.ended = true;
    for (std::thread& other : others) other.join();

    const stylefast::PoolStats stats = scene.pool.stats();
    demand(stats.pinned == 0 && stats.loading == 0, "pages held at the end");
    demand(scene.pool.clear() == 0 && scene.pool.stats().resident == 0, "pages left after clear");
    demand(stats.hits > 0 && stats.misses > 0 && stats.evictions > 0, "the mix: something never happened");
    std::printf("%lld hits, %lld misses, %lld evictions, %ld refused, %ld broken\n", static_cast<long long>(stats.hits),
                static_cast<long long>(stats.misses), static_cast<long long>(stats.evictions), scene.refused.load(),
                scene.broken.load());
}
