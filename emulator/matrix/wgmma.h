// Asynchronous matrix multiply-accumulate of a warpgroup: wgmma.mma_async.m64nNk16 (PTX ISA,
// "Asynchronous warpgroup level matrix instructions").
//
// A wgmma starts once all four warps have committed its group. Each warp's 16 rows then execute
// independently, in order, at times that the configuration's completion selects. Until
// wgmma_wait_group covers it, the accumulator registers hold poison.
#pragma once

#include <cstdint>

#include "emulator/matrix/wgmma_arithmetic.h"

namespace emulator {

/// Needed before the first wgmma after a commit or a wait, unless one of the same shape on the same
/// accumulators is in flight and A is in shared memory; and after registers were written.
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(uint32_t groups_left);

/// d[n / 2] are the calling thread's accumulators; a and b are matrix descriptors.
void wgmma_ss(const WgmmaShape& shape, float* d, uint64_t a, uint64_t b, bool accumulate);
/// a[4] is the calling thread's fragment of A.
void wgmma_rs(const WgmmaShape& shape, float* d, const uint32_t (&a)[4], uint64_t b,
              bool accumulate);

}  // namespace emulator
