// Which page of a style bank lies in which slot of a tier (device buffers, pinned host blocks). Only the books: callers
// move the bytes. Free of any framework. stylefast/runtime/banks/page_pool.py checks arguments, words errors and has
// the plain reference. All methods may be called from any thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace stylefast {

struct PageKey {
    std::int64_t style = 0, step = 0, branch = 0, reference = 0;
};

inline bool operator==(const PageKey& a, const PageKey& b) {
    return a.style == b.style && a.step == b.step && a.branch == b.branch && a.reference == b.reference;
}

struct PoolStats {
    std::int64_t slots, resident, loading, pinned;  // pages; a page may be pinned and resident or loading
    std::int64_t hits, misses, evictions;           // since the pool was made; hits and misses of acquire alone
};

enum class PageState : std::int64_t { kFree, kLoading, kResident, kFailed };

enum class WaitResult { kReady, kFailed, kPending };

// Keys are `count` x 4 numbers (style, step, branch, reference). A page that was dropped, or whose load failed, while
// it was pinned is *stale*: it keeps its slot until its pins are gone, and the next acquire or prefetch of its key
// makes a new page. Since releases name keys, not slots, pins from before and after can't be told apart: the new page
// takes the old one's pins over, and both stay until all are returned.
class PagePool {
  public:
    explicit PagePool(std::int64_t slots);
    PagePool(const PagePool&) = delete;
    PagePool& operator=(const PagePool&) = delete;

    // Pins every page and returns 0, or changes nothing and returns how many pages are absent, for which there is no
    // room. Where claimed, the page was absent and has got a free slot or that of the least recently used unpinned
    // page: the caller fills it and reports `filled` or `failed`.
    std::int64_t acquire(const std::int64_t* keys, std::int64_t count, std::int64_t* slots, bool* claimed);

    // As acquire, but without pins and without failing: slot -1 where no slot is to be had. Earlier keys are needed
    // sooner: no page gives way to a later key of the call, and among the call's own pages the last gives way first.
    void prefetch(const std::int64_t* keys, std::int64_t count, std::int64_t* slots, bool* claimed);

    // The end of a load: -1, or the place of the first slot that is not being loaded, and nothing changes.
    std::int64_t filled(const std::int64_t* slots, std::int64_t count);
    std::int64_t failed(const std::int64_t* slots, std::int64_t count);

    // The place of the first slot without a pin, whose page could leave at any moment; -1: none.
    std::int64_t unpinned(const std::int64_t* slots, std::int64_t count) const;

    // Waits until none of these pinned slots is being loaded or the limit is over (kPending). kFailed where a load
    // failed or a page was released meanwhile.
    WaitResult wait(const std::int64_t* slots, std::int64_t count, std::chrono::milliseconds limit);

    // Returns pins: -1, or the place of the first key that has fewer, and nothing changes.
    std::int64_t release(const std::int64_t* keys, std::int64_t count);

    // Forgets the pages of a style, or all; returns how many keep their slots for now, pinned or being loaded.
    std::int64_t drop(std::int64_t style);
    std::int64_t clear();

    PoolStats stats() const;

    static constexpr std::int64_t kColumns = 8;  // style, step, branch, reference, slot, state, pins, stale
    // Writes a row for each page, at most `slots` of them: first those that may be evicted, least recently used first,
    // then the held ones by slot. Returns their number.
    std::int64_t list(std::int64_t* rows) const;

    std::int64_t slots() const { return static_cast<std::int64_t>(pages_.size()); }

  private:
    struct Page {
        PageKey key;
        PageState state = PageState::kFree;
        bool stale = false;
        std::int64_t pins = 0;
        std::int64_t previous = -1, next = -1;  // neighbours among the evictable; `next` also links free slots
        std::int64_t older = -1;                // the stale page of this key whose pins this page has taken over
        std::int64_t call = 0, place = 0;       // the last call that met this page, and a number of that call's own
    };

    std::size_t home(const PageKey& key) const;
    std::size_t position(const PageKey& key) const;  // of the key's entry, or of the gap where it would go
    std::int64_t find(const PageKey& key) const;
    std::int64_t find_fresh(const PageKey& key) const;  // -1 for a stale page too
    void erase(std::int64_t page);
    bool evictable(const Page& page) const;
    void enlist(std::int64_t page);  // as the most recently used
    void delist(std::int64_t page);
    std::int64_t take_slot();
    std::int64_t make_page(const PageKey& key);
    void pin(std::int64_t page);
    void vanish(std::int64_t page);
    void settle(std::int64_t page);  // after its last pin or its load has gone
    void make_stale(std::int64_t page);
    std::int64_t end_load(const std::int64_t* slots, std::int64_t count, PageState state);
    std::int64_t distinct_absent();
    std::int64_t forget(const std::int64_t* style);

    mutable std::mutex mutex_;
    std::condition_variable loaded_;
    std::vector<Page> pages_;          // by slot
    std::vector<std::int64_t> table_;  // slots by key: open addressing, linear probing, at most half full
    std::vector<PageKey> absent_;      // scratch of acquire
    std::int64_t free_ = -1, oldest_ = -1, newest_ = -1;
    std::int64_t free_count_ = 0, evictable_count_ = 0;
    std::int64_t call_ = 0;
    std::int64_t hits_ = 0, misses_ = 0, evictions_ = 0;
};

}  // namespace stylefast
