// Shared memory of the resident blocks, and the check that every access by address passes.
// An address is 32 bits: an offset into the block's own memory, or `offset | (rank + 1) << 24` for
// memory of the block with that rank in the cluster (mapa).
#pragma once
#include <cstddef>
#include <cstdint>

#include "emulator/machine/machine.h"

namespace emulator {

inline constexpr uint32_t kRankShift = 24;
inline constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;

/// An address, resolved.
struct SharedLocation {
  Block* block;
  uint32_t offset;
  unsigned char* pointer;
};

/// Resolves `address` for an access of `bytes` by the current thread. Fails when it is misaligned
/// or out of bounds, or when it is a peer's and that block has not started or has exited. `what` is
/// the instruction, for the message.
SharedLocation resolve_shared(uint32_t address, uint32_t bytes, uint32_t alignment,
                              const char* what);

/// The same for memory of the current block only (.shared::cta).
unsigned char* own_shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);

/// The same without a current thread: for asynchronous operations into `block`.
unsigned char* shared_of(Block& block, uint32_t offset, uint32_t bytes, uint32_t alignment,
                         const char* what);

/// cvta.to.shared of a generic pointer into the current block's memory.
uint32_t shared_address(const void* pointer);
/// mapa: the same offset in the block with that rank.
uint32_t map_shared(uint32_t address, uint32_t rank);
/// The block that `address` refers to, seen from `block`, and the offset in it.
Block& block_of_address(Block& block, uint32_t address, const char* what);

/// extern __shared__ __align__(1024) unsigned char[].
unsigned char* dynamic_shared_memory();

/// Fills with poison bytes if the configuration says so.
void poison(void* pointer, size_t bytes);

/// Gives a block its memory, poisoned, with inaccessible pages around it. / Fails if a byte between
/// the end of the memory and the end of the page was written. / Takes the memory back.
void take_shared_memory(Block& block, uint32_t bytes);
void check_shared_tail(const Block& block);
void release_shared_memory(Block& block);

}  // namespace emulator
