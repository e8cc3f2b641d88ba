#include "page_pool.h"

#include <algorithm>
#include <tuple>

namespace stylefast {
namespace {

constexpr std::int64_t kNone = -1;

PageKey key_at(const std::int64_t* keys, std::int64_t index) {
    const std::int64_t* own = keys + 4 * index;
    return {own[0], own[1], own[2], own[3]};
}

bool before(const PageKey& a, const PageKey& b) {
    return std::tie(a.style, a.step, a.branch, a.reference) < std::tie(b.style, b.step, b.branch, b.reference);
}

std::uint64_t scramble(std::uint64_t value) {
    value ^= value >> 32;
    value *= 0xd6e8feb86659fd93u;
    value ^= value >> 29;
    value *= 0x9e3779b97f4a7c15u;
    return value ^ (value >> 32);
}

std::size_t table_size(std::int64_t slots) {
    std::size_t size = 2;
    while (size < 2 * static_cast<std::size_t>(slots)) size *= 2;
    return size;
}

}  // namespace

PagePool::PagePool(std::int64_t slots) {
    pages_.resize(static_cast<std::size_t>(slots));
    table_.assign(table_size(slots), kNone);
    absent_.reserve(static_cast<std::size_t>(slots));
    for (std::int64_t slot = slots; slot-- > 0;) {
        pages_[slot].next = free_;
        free_ = slot;
    }
    free_count_ = slots;
}

std::size_t PagePool::home(const PageKey& key) const {
    std::uint64_t hash = 0;
    for (const std::int64_t part : {key.style, key.step, key.branch, key.reference}) {
        hash = scramble(hash + 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(part));
    }
    return hash & (table_.size() - 1);
}

std::size_t PagePool::position(const PageKey& key) const {
    std::size_t at = home(key);
    while (table_[at] != kNone && !(pages_[table_[at]].key == key)) at = (at + 1) & (table_.size() - 1);
    return at;
}

std::int64_t PagePool::find(const PageKey& key) const { return table_[position(key)]; }

std::int64_t PagePool::find_fresh(const PageKey& key) const {
    const std::int64_t page = find(key);
    return page != kNone && pages_[page].stale ? kNone : page;
}

// Later entries of the run move up where their home allows it, so that no markers of erased entries pile up.
void PagePool::erase(std::int64_t page) {
    std::size_t gap = position(pages_[page].key);
    if (table_[gap] != page) return;  // a newer page has taken the entry over
    const std::size_t mask = table_.size() - 1;
    for (std::size_t at = (gap + 1) & mask; table_[at] != kNone; at = (at + 1) & mask) {
        const std::size_t distance = (at - home(pages_[table_[at]].key)) & mask;
        if (distance < ((at - gap) & mask)) continue;
        table_[gap] = table_[at];
        gap = at;
    }
    table_[gap] = kNone;
}

bool PagePool::evictable(const Page& page) const { return page.state == PageState::kResident && page.pins == 0; }

void PagePool::enlist(std::int64_t page) {
    pages_[page].previous = newest_;
    pages_[page].next = kNone;
    (newest_ == kNone ? oldest_ : pages_[newest_].next) = page;
    newest_ = page;
    ++evictable_count_;
}

void PagePool::delist(std::int64_t page) {
    const Page& own = pages_[page];
    (own.previous == kNone ? oldest_ : pages_[own.previous].next) = own.next;
    (own.next == kNone ? newest_ : pages_[own.next].previous) = own.previous;
    --evictable_count_;
}

std::int64_t PagePool::take_slot() {
    if (free_ == kNone) {
        const std::int64_t page = oldest_;
        delist(page);
        vanish(page);
        ++evictions_;
    }
    const std::int64_t slot = free_;
    free_ = pages_[slot].next;
    --free_count_;
    return slot;
}

std::int64_t PagePool::make_page(const PageKey& key) {
    const std::int64_t slot = take_slot();
    const std::size_t at = position(key);
    const std::int64_t older = table_[at];
    Page& page = pages_[slot];
    page.key = key;
    page.state = PageState::kLoading;
    page.stale = false;
    page.pins = older == kNone ? 0 : pages_[older].pins;
    page.older = page.pins > 0 ? older : kNone;
    table_[at] = slot;
    return slot;
}

void PagePool::pin(std::int64_t page) {
    if (evictable(pages_[page])) delist(page);
    ++pages_[page].pins;
}

// the caller has taken the page off the list of the evictable
void PagePool::vanish(std::int64_t page) {
    erase(page);
    pages_[page].state = PageState::kFree;
    pages_[page].stale = false;
    pages_[page].next = free_;
    free_ = page;
    ++free_count_;
}

void PagePool::settle(std::int64_t page) {
    while (page != kNone && pages_[page].pins == 0) {
        Page& own = pages_[page];
        const std::int64_t older = own.older;
        own.older = kNone;
        if (own.state != PageState::kLoading) {
            if (own.stale) {
                vanish(page);
            } else {
                enlist(page);
            }
        }
        if (older != kNone) pages_[older].pins = 0;
        page = older;
    }
}

void PagePool::make_stale(std::int64_t page) {
    if (pages_[page].stale) return;
    if (evictable(pages_[page])) delist(page);
    pages_[page].stale = true;
    settle(page);
}

std::int64_t PagePool::acquire(const std::int64_t* keys, std::int64_t count, std::int64_t* slots, bool* claimed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++call_;
    absent_.clear();
    std::int64_t room = free_count_ + evictable_count_;
    for (std::int64_t i = 0; i < count; ++i) {
        const PageKey key = key_at(keys, i);
        const std::int64_t page = find_fresh(key);
        if (page == kNone) {
            absent_.push_back(key);
        } else if (evictable(pages_[page]) && pages_[page].call != call_) {
            pages_[page].call = call_;
            --room;
        }
    }
    if (static_cast<std::int64_t>(absent_.size()) > room) {
        const std::int64_t needed = distinct_absent();
        if (needed > room) return needed;
    }

    // what is here is pinned first, so that no claim evicts it
    for (std::int64_t i = 0; i < count; ++i) {
        slots[i] = find_fresh(key_at(keys, i));
        claimed[i] = false;
        if (slots[i] == kNone) continue;
        pin(slots[i]);
        ++hits_;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        if (slots[i] != kNone) continue;
        const PageKey key = key_at(keys, i);
        slots[i] = find_fresh(key);  // a key given twice was claimed a moment ago
        claimed[i] = slots[i] == kNone;
        if (claimed[i]) slots[i] = make_page(key);
        ++pages_[slots[i]].pins;
        ++(claimed[i] ? misses_ : hits_);
    }
    return 0;
}

std::int64_t PagePool::distinct_absent() {
    std::sort(absent_.begin(), absent_.end(), before);
    return std::unique(absent_.begin(), absent_.end()) - absent_.begin();
}

void PagePool::prefetch(const std::int64_t* keys, std::int64_t count, std::int64_t* slots, bool* claimed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++call_;
    // backwards, so that the first key's page becomes the most recently used
    for (std::int64_t i = count; i-- > 0;) {
        const std::int64_t page = find_fresh(key_at(keys, i));
        if (page == kNone) continue;
        pages_[page].call = call_;
        pages_[page].place = i;
        if (evictable(pages_[page])) {
            delist(page);
            enlist(page);
        }
    }
    for (std::int64_t i = 0; i < count; ++i) {
        const PageKey key = key_at(keys, i);
        slots[i] = find_fresh(key);
        claimed[i] = false;
        if (slots[i] != kNone) continue;
        const bool oldest_gives_way = oldest_ != kNone && (pages_[oldest_].call != call_ || pages_[oldest_].place > i);
        if (free_ == kNone && !oldest_gives_way) continue;
        slots[i] = make_page(key);
        claimed[i] = true;
    }
}

std::int64_t PagePool::end_load(const std::int64_t* slots, std::int64_t count, PageState state) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++call_;
        for (std::int64_t i = 0; i < count; ++i) {
            Page& page = pages_[slots[i]];
            if (page.state != PageState::kLoading || page.call == call_) return i;
            page.call = call_;
        }
        for (std::int64_t i = 0; i < count; ++i) {
            Page& page = pages_[slots[i]];
            page.state = state;
            page.stale |= state == PageState::kFailed;
            settle(slots[i]);
        }
    }
    loaded_.notify_all();
    return kNone;
}

std::int64_t PagePool::filled(const std::int64_t* slots, std::int64_t count) {
    return end_load(slots, count, PageState::kResident);
}

std::int64_t PagePool::failed(const std::int64_t* slots, std::int64_t count) {
    return end_load(slots, count, PageState::kFailed);
}

std::int64_t PagePool::unpinned(const std::int64_t* slots, std::int64_t count) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(slots, slots + count, [&](std::int64_t slot) { return pages_[slot].pins == 0; });
    return found == slots + count ? kNone : found - slots;
}

WaitResult PagePool::wait(const std::int64_t* slots, std::int64_t count, std::chrono::milliseconds limit) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto all = [&](auto&& holds) { return std::all_of(slots, slots + count, holds); };
    const bool ended = loaded_.wait_until(lock, std::chrono::steady_clock::now() + limit, [&] {
        return all([&](std::int64_t slot) { return pages_[slot].state != PageState::kLoading; });
    });
    if (!ended) return WaitResult::kPending;
    const bool ready =
        all([&](std::int64_t slot) { return pages_[slot].state == PageState::kResident && pages_[slot].pins > 0; });
    return ready ? WaitResult::kReady : WaitResult::kFailed;
}

std::int64_t PagePool::release(const std::int64_t* keys, std::int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++call_;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t page = find(key_at(keys, i));
        if (page == kNone) return i;
        if (pages_[page].call != call_) {
            pages_[page].call = call_;
            pages_[page].place = pages_[page].pins;  // what is left of them
        }
        if (pages_[page].place-- == 0) return i;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t page = find(key_at(keys, i));
        if (--pages_[page].pins == 0) settle(page);
    }
    return kNone;
}

std::int64_t PagePool::forget(const std::int64_t* style) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto concerns = [style](const Page& page) {
        return page.state != PageState::kFree && (!style || page.key.style == *style);
    };
    for (std::int64_t slot = 0; slot < slots(); ++slot) {
        if (concerns(pages_[slot])) make_stale(slot);
    }
    return std::count_if(pages_.begin(), pages_.end(), concerns);
}

std::int64_t PagePool::drop(std::int64_t style) { return forget(&style); }

std::int64_t PagePool::clear() { return forget(nullptr); }

PoolStats PagePool::stats() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    PoolStats stats{slots(), 0, 0, 0, hits_, misses_, evictions_};
    for (const Page& page : pages_) {
        stats.resident += page.state == PageState::kResident;
        stats.loading += page.state == PageState::kLoading;
        stats.pinned += page.pins > 0;
    }
    return stats;
}

std::int64_t PagePool::list(std::int64_t* rows) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::int64_t count = 0;
    const auto write = [&](std::int64_t slot) {
        const Page& page = pages_[slot];
        std::int64_t* row = rows + kColumns * count++;
        const std::int64_t values[kColumns] = {page.key.style,     page.key.step, page.key.branch,
                                               page.key.reference, slot,          static_cast<std::int64_t>(page.state),
                                               page.pins,          page.stale};
        std::copy(values, values + kColumns, row);
    };
    for (std::int64_t slot = oldest_; slot != kNone; slot = pages_[slot].next) write(slot);
    for (std::int64_t slot = 0; slot < slots(); ++slot) {
        if (pages_[slot].state != PageState::kFree && !evictable(pages_[slot])) write(slot);
    }
    return count;
}

}  // namespace stylefast
