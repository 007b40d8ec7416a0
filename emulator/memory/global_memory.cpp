// The list of global buffers, and buffers between guard zones.
#include "emulator/memory/global_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/machine/config.h"
#include "emulator/machine/pages.h"
#include "emulator/race/race.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

constexpr size_t kGuardBytes = 1024;  // keeps the data 1024-byte aligned
constexpr unsigned char kGuardByte = 0xC5;

std::vector<GlobalRange>& ranges() {
  static std::vector<GlobalRange> all;
  return all;
}

// A buffer's mapping: an inaccessible page, the guard zone, the data, the guard zone up to the end
// of a page, an inaccessible page. The first zone takes a page's last bytes, so that the data begin
// at a page.
size_t writable_bytes(size_t bytes) { return page_bytes() + whole_pages(bytes + kGuardBytes); }

void add_range(GlobalRange range) {
  // A buffer of the host is initialised, one allocated here is poison.
  race_global_begin(range.begin, range.bytes, range.guard_bytes, range.name.c_str(),
                    /*initialised=*/range.guard_bytes == 0);
  auto& all = ranges();
  const auto position = std::find_if(
      all.begin(), all.end(), [&](const GlobalRange& other) { return other.begin > range.begin; });
  all.insert(position, std::move(range));
}

// The last registered buffer that begins at or before `pointer`, or a guard zone before it.
const GlobalRange* nearest(const unsigned char* pointer) {
  const auto& all = ranges();
  const auto after = std::upper_bound(all.begin(), all.end(), pointer,
                                      [](const unsigned char* p, const GlobalRange& range) {
                                        return p < range.begin - range.guard_bytes;
                                      });
  return after == all.begin() ? nullptr : &*(after - 1);
}

}  // namespace

void register_global(const void* pointer, size_t bytes, const char* name) {
  add_range({static_cast<const unsigned char*>(pointer), bytes, 0, name});
}

void unregister_global(const void* pointer) {
  race_global_end(pointer);
  std::erase_if(ranges(), [&](const GlobalRange& range) { return range.begin == pointer; });
}

const std::vector<GlobalRange>& global_ranges() { return ranges(); }

const GlobalRange* find_global(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  const GlobalRange* range = nearest(byte);
  return range != nullptr && byte >= range->begin && byte < range->begin + range->bytes ? range
                                                                                        : nullptr;
}

void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  const GlobalRange* range = nearest(byte);
  const bool concerns = range != nullptr && byte < range->begin + range->bytes + range->guard_bytes;
  if (concerns && (byte < range->begin || byte + bytes > range->begin + range->bytes)) {
    fail(ErrorKind::Misuse,
         "%s: %zu bytes at offset %td lie outside of the %zu bytes of global buffer '%s'", what,
         bytes, byte - range->begin, range->bytes, range->name.c_str());
  }
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail(ErrorKind::Misuse, "%s: global address %p is not %zu-byte aligned%s%s", what, pointer,
         alignment, concerns ? ", in buffer " : "", concerns ? range->name.c_str() : "");
  }
}

void check_guard_zones() {
#if !defined(__SANITIZE_ADDRESS__)  // which reports the access itself
  for (const GlobalRange& range : ranges()) {
    const auto intact = [](const unsigned char* begin, const unsigned char* end) {
      return std::all_of(begin, end, [](unsigned char byte) { return byte == kGuardByte; });
    };
    const unsigned char* end = range.begin + range.bytes;
    if (!intact(range.begin - range.guard_bytes, range.begin)) {
      fail(ErrorKind::Misuse, "something wrote before the beginning of global buffer '%s'",
           range.name.c_str());
    }
    if (!intact(end, end + range.guard_bytes)) {
      fail(ErrorKind::Misuse, "something wrote past the %zu bytes of global buffer '%s'",
           range.bytes, range.name.c_str());
    }
  }
#endif
}

unsigned char* allocate_global(size_t bytes, const char* name) {
  const size_t writable = writable_bytes(bytes), page = page_bytes();
  void* memory = mmap(nullptr, writable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* first = static_cast<unsigned char*>(memory) + page;
  if (memory == MAP_FAILED || mprotect(first, writable, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulator: cannot map a global buffer");
    std::abort();
  }
  unsigned char* data = first + page;
  std::memset(data - kGuardBytes, kGuardByte, kGuardBytes);
  std::memset(data, kPoisonByte, bytes);
  std::memset(data + bytes, kGuardByte, kGuardBytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(first, page);
  __asan_poison_memory_region(data + bytes, static_cast<size_t>(first + writable - (data + bytes)));
#endif
  add_range({data, bytes, kGuardBytes, name});
  return data;
}

void free_global(unsigned char* pointer) {
  const auto& all = ranges();
  const auto range = std::find_if(all.begin(), all.end(),
                                  [&](const GlobalRange& r) { return r.begin == pointer; });
  const size_t writable = writable_bytes(range->bytes);
  unsigned char* first = pointer - page_bytes();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(first, writable);
#endif
  unregister_global(pointer);
  munmap(first - page_bytes(), writable + 2 * page_bytes());
}

}  // namespace emulator
