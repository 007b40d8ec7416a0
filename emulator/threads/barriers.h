// Named barriers of a block (bar.sync, bar.arrive, __syncthreads).
#pragma once
#include <cstdint>

namespace emulator {

void bar_sync(uint32_t id, uint32_t threads);
void bar_arrive(uint32_t id, uint32_t threads);
/// __syncthreads: barrier 0 over all threads of the block.
void syncthreads();

}  // namespace emulator
