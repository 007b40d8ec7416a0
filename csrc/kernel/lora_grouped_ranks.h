// The ranks of many adapters, clamped to 0..most_rank.
#pragma once
#include "kernel/lora_grouped.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

__device__ __forceinline__ int clamped_rank(int rank, int most_rank) {
  return min(max(rank, 0), most_rank);
}

__device__ __forceinline__ int rank_of(const LoraGroupedFactors& factors, int adapter,
                                       int most_rank) {
  return clamped_rank(
      factors.entries != nullptr ? factors.entries[adapter].rank : factors.ranks[adapter],
      most_rank);
}

}  // namespace lora_ext::kernel
