// The instances of lora_grouped_entries and lora_grouped_segments' kernels that the tests run.
#pragma once
#include <cuda_fp16.h>

#include "emulated/kernels/instance.h"
#include "kernels/grouped/segments.h"

namespace lora_ext::kernel {
INSTANCE(lora_grouped_entries<__half>(LoraGroupedEntriesParams))
INSTANCE(lora_grouped_count<__half>(LoraGroupedSegmentsParams))
INSTANCE(lora_grouped_scan<__half>(LoraGroupedSegmentsParams))
INSTANCE(lora_grouped_place<__half>(LoraGroupedSegmentsParams))
}  // namespace lora_ext::kernel
