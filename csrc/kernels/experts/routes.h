// lora_experts_routes: sorts the slots of tokens by expert, by the counting sort of
// grouped/segments.h, and writes the tables of all products of a layer, which need no ranks:
//
//     count, begin, place     chunks of slots, a block each; of at most one chunk all by one kernel
#pragma once
#include "kernels/grouped/segments.h"
#include "kernels/lora_experts.h"

namespace lora_ext::kernel {

// Experts as adapters of the sort, and what else it reads and writes.
struct ExpertsSortParams : LoraGroupedSegmentsParams {
  ExpertsRoutesParams routes;
};

template <class Index>
struct ExpertsSort {
  static constexpr int kThreads = ExpertsSortParams::kThreads;
  static_assert(kThreads == ExpertsRoutesParams::kChunk);

  const ExpertsSortParams& p;
  const LoraGroupedChunk chunk{p};

  // The expert of this thread's slot, or their number without one.
  __device__ __forceinline__ int key() const {
    if (chunk.row >= p.rows.m) return -1;
    const Index expert = static_cast<const Index*>(p.routes.index)[chunk.row];
    // A number of int64 is cut when it is known to be small. NOLINTNEXTLINE(custom-cut-to-32-bits)
    return expert < 0 || expert >= p.rows.groups ? p.rows.groups : static_cast<int>(expert);
  }

  __device__ __forceinline__ void begin() const {
    LoraGroupedScan{p}.begin_chunks();
    for (int expert = chunk.thread; expert < p.rows.groups; expert += kThreads)
      p.routes.offs[expert] = p.tables.counts[(expert + int64_t{1}) * p.chunks()];
    LoraGroupedScan{p}.run();  // a thread reads the ends that it has written
  }

  __device__ __forceinline__ void place() const {
    const int position = chunk.position(key());
    if (position < 0) return;
    p.routes.perm[position] = chunk.row, p.routes.token[position] = chunk.row / p.routes.slots;
    p.routes.place[chunk.row] = position;
  }
};

// Grid: chunks.
template <class Index>
__global__ void __launch_bounds__(ExpertsSortParams::kThreads)
    lora_experts_count(const __grid_constant__ ExpertsSortParams p) {
  const ExpertsSort<Index> sort{p};
  sort.chunk.count(sort.key());
}

// Grid: one block.
template <class Index>
__global__ void __launch_bounds__(ExpertsSortParams::kThreads)
    lora_experts_begin(const __grid_constant__ ExpertsSortParams p) {
  ExpertsSort<Index>{p}.begin();
}

// Grid: chunks.
template <class Index>
__global__ void __launch_bounds__(ExpertsSortParams::kThreads)
    lora_experts_place(const __grid_constant__ ExpertsSortParams p) {
  ExpertsSort<Index>{p}.place();
}

// Grid: one block, for one chunk.
template <class Index>
__global__ void __launch_bounds__(ExpertsSortParams::kThreads)
    lora_experts_routes(const __grid_constant__ ExpertsSortParams p) {
  const ExpertsSort<Index> sort{p};
  sort.chunk.count(sort.key());
  __syncthreads();  // before other threads read the counts
  sort.begin();
  sort.place();
}

}  // namespace lora_ext::kernel
