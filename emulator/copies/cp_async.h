// cp.async: copies of 4, 8 or 16 bytes from global to shared memory, in per-thread groups.
#pragma once
#include <cstdint>

namespace emulator {

struct Thread;

/// Copies `source_bytes` and writes zeros up to the size. The destination is untouchable until a
/// wait_group covers it.
void cp_async_16(uint32_t destination, const void* source, uint32_t source_bytes);
void cp_async_commit_group();
void cp_async_wait_group(uint32_t groups_left);

/// Fails if a copy was not waited for.
void cp_async_thread_exits(Thread& thread);

}  // namespace emulator
