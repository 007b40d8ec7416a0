// lora_grouped_entries: writes a list of adapters that the host has as a table on the device.
// Entries are kernel parameters, so that the launch can be captured and no copy is waited for.
#pragma once
#include "kernel/lora_grouped.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

struct LoraGroupedEntriesParams {
  static constexpr int kMost = 64;  // per launch: 2.5 of the 4 KiB that parameters may have
  LoraGroupedEntry entries[kMost];
  LoraGroupedEntry* to;
  int count;
};

// One block, one thread per entry; entries do not depend on T.
template <class T>
__global__ void __launch_bounds__(LoraGroupedEntriesParams::kMost)
    lora_grouped_entries(const __grid_constant__ LoraGroupedEntriesParams p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.count) p.to[i] = p.entries[i];
}

}  // namespace lora_ext::kernel
