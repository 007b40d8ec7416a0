// Memory for the resident blocks, and the resolution of shared addresses.
#include "emulator/memory/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator/machine/pages.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

constexpr unsigned char kTailByte =
    0xC5;  // between the end of the memory and the end of its last page

size_t mapped_bytes(uint32_t bytes) { return whole_pages(std::max<size_t>(bytes, 1)); }

// Address space for the largest block is reserved once per arena, between two inaccessible pages,
// and reused.
struct Arena {
  unsigned char* begin;
  size_t bytes;
};
std::vector<Arena>& arena_pool() {
  static std::vector<Arena> pool;
  return pool;
}

unsigned char* take_arena(size_t bytes) {
  auto& pool = arena_pool();
  for (size_t i = pool.size(); i-- > 0;) {
    if (pool[i].bytes != bytes) continue;
    unsigned char* begin = pool[i].begin;
    pool.erase(pool.begin() + static_cast<std::ptrdiff_t>(i));
    return begin;
  }
  const size_t guard = page_bytes();
  void* memory = mmap(nullptr, bytes + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* begin = static_cast<unsigned char*>(memory) + guard;
  if (memory == MAP_FAILED || mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulator: cannot map a block's shared memory; lower Config::resident_clusters");
    std::abort();
  }
  return begin;
}

void check_offset(const Block& block, uint32_t offset, uint32_t bytes, uint32_t alignment,
                  const char* what) {
  if (offset % alignment != 0) {
    fail(ErrorKind::Misuse, "%s: shared address 0x%x is not %u-byte aligned", what, offset,
         alignment);
  }
  if (static_cast<uint64_t>(offset) + bytes > block.shared_bytes) {
    fail(
        ErrorKind::Misuse,
        "%s: bytes [0x%x, 0x%x) lie outside of the 0x%x bytes of shared memory of block (%u,%u,%u)",
        what, offset, offset + bytes, block.shared_bytes, block.index.x, block.index.y,
        block.index.z);
  }
}

}  // namespace

Block& block_of_address(Block& block, uint32_t address, const char* what) {
  const uint32_t mapped_rank = address >> kRankShift;
  if (mapped_rank == 0) return block;
  const auto& blocks = block.cluster->blocks;
  if (mapped_rank > blocks.size()) {
    fail(ErrorKind::Misuse, "%s: shared address 0x%x names rank %u of a cluster of %zu blocks",
         what, address, mapped_rank - 1, blocks.size());
  }
  return *blocks[mapped_rank - 1];
}

unsigned char* shared_of(Block& block, uint32_t offset, uint32_t bytes, uint32_t alignment,
                         const char* what) {
  if (block.state != BlockState::Running) {
    fail(ErrorKind::Misuse,
         "%s touches shared memory of block (%u,%u,%u), which %s: synchronise the cluster first",
         what, block.index.x, block.index.y, block.index.z,
         block.state == BlockState::Exited ? "has exited" : "has not started");
  }
  check_offset(block, offset, bytes, alignment, what);
  return block.shared + offset;
}

SharedLocation resolve_shared(uint32_t address, uint32_t bytes, uint32_t alignment,
                              const char* what) {
  Block& block = block_of_address(current_thread().block(), address, what);
  const uint32_t offset = address & kOffsetMask;
  return {&block, offset, shared_of(block, offset, bytes, alignment, what)};
}

unsigned char* own_shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  Block& block = current_thread().block();
  const uint32_t mapped_rank = address >> kRankShift;
  if (mapped_rank != 0 && mapped_rank != block.rank + 1) {
    fail(ErrorKind::Misuse,
         "%s: 0x%x is an address in the block of rank %u; this instruction reaches its own block "
         "only",
         what, address, mapped_rank - 1);
  }
  check_offset(block, address & kOffsetMask, bytes, alignment, what);
  return block.shared + (address & kOffsetMask);
}

uint32_t shared_address(const void* pointer) {
  const Block& block = current_thread().block();
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(block.shared_bytes)) {
    fail(ErrorKind::Misuse, "cvta.to.shared: %p does not point into the block's shared memory",
         pointer);
  }
  return static_cast<uint32_t>(offset);
}

uint32_t map_shared(uint32_t address, uint32_t rank) {
  const auto& blocks = current_thread().block().cluster->blocks;
  if (rank >= blocks.size()) {
    fail(ErrorKind::Misuse, "mapa: rank %u in a cluster of %zu blocks", rank, blocks.size());
  }
  return (address & kOffsetMask) | (rank + 1) << kRankShift;
}

unsigned char* dynamic_shared_memory() { return current_thread().block().shared; }

void poison(void* pointer, size_t bytes) {
  if (machine().config.poison) std::memset(pointer, kPoisonByte, bytes);
}

void take_shared_memory(Block& block, uint32_t bytes) {
  const size_t mapped = mapped_bytes(bytes);
  block.shared = take_arena(mapped);
  block.shared_bytes = bytes;
  std::memset(block.shared, machine().config.poison ? kPoisonByte : 0, bytes);
  std::memset(block.shared + bytes, kTailByte, mapped - bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + bytes, mapped - bytes);
#endif
  race_shared_begin(block.shared, bytes);
}

void check_shared_tail([[maybe_unused]] const Block& block) {
#if !defined(__SANITIZE_ADDRESS__)  // which reports the access itself
  const unsigned char* tail = block.shared + block.shared_bytes;
  const unsigned char* end = block.shared + mapped_bytes(block.shared_bytes);
  const unsigned char* written =
      std::find_if(tail, end, [](unsigned char byte) { return byte != kTailByte; });
  if (written != end) {
    fail(ErrorKind::Misuse, "block (%u,%u,%u) wrote byte 0x%zx of its 0x%x bytes of shared memory",
         block.index.x, block.index.y, block.index.z, static_cast<size_t>(written - block.shared),
         block.shared_bytes);
  }
#endif
}

void release_shared_memory(Block& block) {
  const size_t mapped = mapped_bytes(block.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, mapped);
#endif
  race_shared_end(block.shared, block.shared_bytes);
  arena_pool().push_back({block.shared, mapped});
  block.shared = nullptr;
}

}  // namespace emulator
