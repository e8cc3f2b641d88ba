#include "copy_engine.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
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
        if (chunk.file >= 0) {
            *chunk.outcome = read(chunk);
        } else if (chunk.bytes > 0) {
            const auto source = static_cast<std::uintptr_t>(chunk.source);
            std::memcpy(chunk.destination, reinterpret_cast<const void*>(source), chunk.bytes);
        }
        lock.lock();
        chunk.done = true;
        // another thread may still be at an earlier chunk; it will count this one too
        const std::int64_t before = completed_;
        while (completed_ < taken_ && slot(completed_).done) slot(completed_++).done = false;
        if (completed_ > before) copied_.notify_all();
    }
}

// The outcome of a chunk that lies in a file. A file that is mapped instead would end the process with SIGBUS when
// somebody cuts it short.
std::int32_t CopyEngine::read(const Chunk& chunk) {
    char* to = static_cast<char*>(chunk.destination);
    std::size_t left = chunk.bytes;
    off_t at = static_cast<off_t>(chunk.source);
    while (left > 0) {
        const ssize_t count = pread(chunk.file, to, left, at);
        if (count == 0) return kShort;
        if (count < 0 && errno != EINTR) return errno;
        if (count < 0) continue;
        to += count;
        at += count;
        left -= static_cast<std::size_t>(count);
    }
    return 0;
}

CopyEngine::Ticket CopyEngine::submit(const std::int64_t* sources, const std::int64_t* destinations,
                                      const std::int64_t* bytes, std::int64_t count, const std::int32_t* files,
                                      std::int32_t* outcomes) {
    for (std::int64_t i = 0; i < count; ++i) {
        const bool stored = files != nullptr && files[i] >= 0;
        const bool source = stored ? sources[i] >= 0 : sources[i] != 0;
        if (bytes[i] < 0 || (bytes[i] > 0 && (!source || destinations[i] == 0))) {
            throw std::invalid_argument("chunk " + std::to_string(i) + " has " + std::to_string(bytes[i]) +
                                        " bytes, source " + std::to_string(sources[i]) + " and destination " +
                                        std::to_string(destinations[i]) +
                                        "; sizes and offsets are 0 or more, addresses not null");
        }
        if (outcomes != nullptr) outcomes[i] = 0;
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
        chunk.source = sources[i];
        chunk.file = files != nullptr ? files[i] : -1;
        chunk.outcome = outcomes != nullptr ? outcomes + i : nullptr;
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
