// The size of a page: what mmap and mprotect work in.
#pragma once
#include <unistd.h>

#include <cstddef>

namespace emulator {

inline size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// `bytes`, rounded up.
inline size_t whole_pages(size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

}  // namespace emulator
