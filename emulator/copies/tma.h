// Bulk tensor copies (TMA) of two-dimensional boxes between global and shared memory.
//
// x counts elements along a row, a multiple of 16 bytes, y counts rows; both may be negative or lie
// beyond the tensor. A load fills what is outside with zeros and counts the bytes of the full box; a
// store does not write it, but whole chunks of 16 bytes: the last of a row may reach past the width.
#pragma once

#include <cstdint>

#include "emulator/copies/tensor_map.h"

namespace emulator {

void prefetch_tensor_map(const CUtensorMap* map);

/// cp.async.bulk.tensor.2d.shared::cluster.global: completes the box's bytes at the mbarrier `bar`,
/// which lies in the same block as `dst`. The box lands in two parts at different times.
void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t bar, int32_t x, int32_t y);

/// .multicast::cluster: the box goes to the offsets of `dst` and `bar` in each block whose bit is
/// set in `mask`, to each at a time of its own.
void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int32_t x, int32_t y,
                           uint16_t mask);

/// cp.async.bulk.tensor.2d.global.shared::cta.bulk_group: first reads the source, later writes.
void tma_store_2d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y);

/// Bulk groups are per thread.
void bulk_commit_group();
void bulk_wait_group(uint32_t groups_left);
void bulk_wait_group_read(uint32_t groups_left);

}  // namespace emulator
