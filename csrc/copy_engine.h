// Copies lists of memory blocks, and of pieces of files, in the background. Free of any framework; the twin in Python
// is stylefast/runtime/banks/copy_engine.py. All methods may be called from any thread.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace stylefast {

// One queue for all lists: chunks are counted from the first one ever given, and `completed` is the number before which
// everything is copied. A ticket is therefore two numbers, and nothing has to be kept for it.
class CopyEngine {
  public:
    struct Ticket {
        std::int64_t first, chunks;
    };

    // `capacity`: chunks that may wait. std::invalid_argument where either is below 1.
    CopyEngine(std::int64_t threads, std::int64_t capacity);
    ~CopyEngine() { close(); }
    CopyEngine(const CopyEngine&) = delete;
    CopyEngine& operator=(const CopyEngine&) = delete;

    // Copies bytes[i] bytes from address sources[i] to destinations[i], in this order; the blocks must stay where they
    // are until the ticket is done. With `files`, files[i] is a descriptor from which the bytes are read at offset
    // sources[i], or -1 for a block in memory; outcomes[i], which must stay too, is set to 0, to kShort where the file
    // ends before, or to the system's error number. Blocks while the queue is full. std::invalid_argument, before
    // anything is copied, for a negative size or offset or a null address; std::logic_error after close.
    Ticket submit(const std::int64_t* sources, const std::int64_t* destinations, const std::int64_t* bytes,
                  std::int64_t count, const std::int32_t* files = nullptr, std::int32_t* outcomes = nullptr);

    static constexpr std::int32_t kShort = -1;

    // How many of the ticket's chunks are copied: its first so many, and everything submitted before.
    std::int64_t progress(const Ticket& ticket) const;

    // Until the first `chunks` of the ticket are copied, or all where that is -1. std::out_of_range above its number.
    void wait(const Ticket& ticket, std::int64_t chunks) const;

    // Copies what is queued and ends the threads. Again: nothing.
    void close();

  private:
    struct Chunk {
        std::int64_t source = 0;  // an address, or an offset in the file
        void* destination = nullptr;
        std::size_t bytes = 0;
        std::int32_t file = -1;
        std::int32_t* outcome = nullptr;
        bool done = false;
    };

    void work();
    static std::int32_t read(const Chunk& chunk);
    Chunk& slot(std::int64_t number) { return ring_[static_cast<std::size_t>(number) % ring_.size()]; }

    std::mutex lists_;  // held while a list is given, so that its numbers have no gaps; taken before mutex_
    mutable std::mutex mutex_;
    std::condition_variable given_;
    mutable std::condition_variable copied_;
    std::vector<Chunk> ring_;  // by chunk number modulo its size
    std::int64_t submitted_ = 0, taken_ = 0, completed_ = 0;
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace stylefast
