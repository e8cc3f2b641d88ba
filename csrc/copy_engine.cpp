#include "copy_engine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace stylefast {

CopyEngine::CopyEngine(std::int64_t threads, std::int64_t capacity) {
    if (threads < 1 || capacity < 1) {
        throw std::invalid_argument("threads is " + std::to_string(threads) + " and capacity " +
                                    std::to_string(capacity) + ", but both must be 1 or more");
    }
    ring_.resize(static_cast<std::size_t>(capacity));
    threads_.reserve(static_cast<std::size_t>(threads));
    try {
        for (std::int64_t i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
        close();  // a thread that was refused must not leave its siblings behind
        throw;
    }
}

void CopyEngine::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        given_.wait(lock, [this] { return taken_ < submitted_ || closed_; });
        if (taken_ == submitted_) return;
        Chunk& chunk = slot(taken_++);
        lock.unlock();
        if (chunk.bytes > 0) std::memcpy(chunk.destination, chunk.source, chunk.bytes);
        lock.lock();
        chunk.done = true;
        // another thread may still be at an earlier chunk; it will count this one too
        const std::int64_t before = completed_;
        while (completed_ < taken_ && slot(completed_).done) slot(completed_++).done = false;
        if (completed_ > before) copied_.notify_all();
    }
}

CopyEngine::Ticket CopyEngine::submit(const std::int64_t* sources, const std::int64_t* destinations,
                                      const std::int64_t* bytes, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (bytes[i] < 0 || (bytes[i] > 0 && (sources[i] == 0 || destinations[i] == 0))) {
            throw std::invalid_argument("chunk " + std::to_string(i) + " has " + std::to_string(bytes[i]) +
                                        " bytes and addresses " + std::to_string(sources[i]) + " and " +
                                        std::to_string(destinations[i]) + "; sizes are 0 or more, addresses not null");
        }
    }
    const std::lock_guard<std::mutex> list(lists_);
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) throw std::logic_error("the copy engine is closed");
    const Ticket ticket{submitted_, count};
    const std::int64_t capacity = static_cast<std::int64_t>(ring_.size());
    for (std::int64_t i = 0; i < count; ++i) {
        if (submitted_ - completed_ == capacity) {
            given_.notify_all();
            copied_.wait(lock, [&] { return submitted_ - completed_ < capacity; });
        }
        Chunk& chunk = slot(submitted_++);
        chunk.source = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(sources[i]));
        chunk.destination = reinterpret_cast<void*>(static_cast<std::uintptr_t>(destinations[i]));
        chunk.bytes = static_cast<std::size_t>(bytes[i]);
    }
    given_.notify_all();
    return ticket;
}

std::int64_t CopyEngine::progress(const Ticket& ticket) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::clamp<std::int64_t>(completed_ - ticket.first, 0, ticket.chunks);
}

void CopyEngine::wait(const Ticket& ticket, std::int64_t chunks) const {
    if (chunks < -1 || chunks > ticket.chunks) {
        throw std::out_of_range("chunks is " + std::to_string(chunks) + ", but the ticket has " +
                                std::to_string(ticket.chunks));
    }
    const std::int64_t end = ticket.first + (chunks == -1 ? ticket.chunks : chunks);
    std::unique_lock<std::mutex> lock(mutex_);
    // none of its chunks: nothing to wait for, whatever was submitted before
    if (end > ticket.first) copied_.wait(lock, [&] { return completed_ >= end; });
}

void CopyEngine::close() {
    const std::lock_guard<std::mutex> list(lists_);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
    }
    given_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

}  // namespace stylefast
