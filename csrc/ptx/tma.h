// Bulk tensor copies (TMA) of 2-D tiles. x is the coordinate along the contiguous dimension, a
// multiple of 16 bytes; elements outside of the tensor are read as zero and not written, but for
// those that share 16 bytes with the last one of a row.
#pragma once

#include <cuda.h>

#include "ptx/target.h"

namespace lora_ext::ptx {

// prefetch.tensormap (sm_90): loads the descriptor into its cache.
LORA_EXT_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  emulator::prefetch_tensor_map(map);
#endif
}

// cp.async.bulk.tensor.2d, global to shared (sm_90): completes the bytes of a full box at `bar`.
LORA_EXT_DEVICE void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t bar, int32_t x,
                                 int32_t y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(x), "r"(y)
      : "memory");
#else
  emulator::tma_load_2d(dst, map, bar, x, y);
#endif
}

// cp.async.bulk.tensor.2d.multicast::cluster (sm_90): the same box into each block whose bit is set
// in `mask`, at the same offsets of data and mbarrier.
LORA_EXT_DEVICE void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar,
                                           int32_t x, int32_t y, uint16_t mask) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(dst),
      "l"(map), "r"(bar), "h"(mask), "r"(x), "r"(y)
      : "memory");
#else
  emulator::tma_load_2d_multicast(dst, map, bar, x, y, mask);
#endif
}

// cp.async.bulk.tensor.2d, shared to global (sm_90): joins this thread's open bulk group.
LORA_EXT_DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(src), "r"(x), "r"(y)
      : "memory");
#else
  emulator::tma_store_2d(map, src, x, y);
#endif
}

// cp.async.bulk.commit_group (sm_90): this thread's open bulk copies become one group.
LORA_EXT_DEVICE void bulk_commit_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulator::bulk_commit_group();
#endif
}

// cp.async.bulk.wait_group (sm_90): waits until at most the kPending latest groups are incomplete;
// the others' writes are visible to this thread.
template <int kPending>
LORA_EXT_DEVICE void bulk_wait_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::bulk_wait_group(kPending);
#endif
}

// cp.async.bulk.wait_group.read (sm_90): waits until all but the kPending latest groups have read
// their sources, so that shared memory may be overwritten.
template <int kPending>
LORA_EXT_DEVICE void bulk_wait_group_read() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#else
  emulator::bulk_wait_group_read(kPending);
#endif
}

}  // namespace lora_ext::ptx
