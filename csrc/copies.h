// Copies lists of memory blocks, and of pieces of files. Free of any framework; may be called from many threads at
// once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stylefast {

struct CopyFailure {
    std::int64_t index;   // of the piece that could not be read; -1: all are copied
    std::int32_t reason;  // the system's error number; 0: the file ends too early
};

// Copies bytes[i] bytes from address sources[i] to destinations[i], in this order. Where files[i] is a descriptor and
// not -1, they are read from that file at offset sources[i]. Stops at the first piece that can't be read.
CopyFailure copy_blocks(const std::int64_t* sources, const std::int64_t* destinations, const std::int64_t* bytes,
                        const std::int32_t* files, std::int64_t count);

}  // namespace stylefast
