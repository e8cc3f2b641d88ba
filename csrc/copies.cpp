#include "copies.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace stylefast {
namespace {

// A file that is mapped instead would end the process with SIGBUS if another program truncates it.
CopyFailure read(int file, std::int64_t offset, char* to, std::size_t bytes, std::int64_t index) {
    while (bytes > 0) {
        const ssize_t count = pread(file, to, bytes, static_cast<off_t>(offset));
        if (count == 0) return {index, 0};
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return {index, errno};
        to += count;
        offset += count;
        bytes -= static_cast<std::size_t>(count);
    }
    return {-1, 0};
}

}  // namespace

CopyFailure copy_blocks(const std::int64_t* sources, const std::int64_t* destinations, const std::int64_t* bytes,
                        const std::int32_t* files, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        char* const to = reinterpret_cast<char*>(static_cast<std::uintptr_t>(destinations[i]));
        const auto size = static_cast<std::size_t>(bytes[i]);
        if (files[i] >= 0) {
            const CopyFailure failure = read(files[i], sources[i], to, size, i);
            if (failure.index >= 0) return failure;
        } else if (size > 0) {
            std::memcpy(to, reinterpret_cast<const void*>(static_cast<std::uintptr_t>(sources[i])), size);
        }
    }
    return {-1, 0};
}

}  // namespace stylefast
