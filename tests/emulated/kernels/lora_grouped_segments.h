// The instances of lora_grouped_entries and lora_grouped_segments' kernels that the tests run.
#pragma once
#include <cuda_fp16.h>

#include "kernel/lora_grouped_entries.h"
#include "kernel/lora_grouped_segments.h"

// To be used in namespace lora_ext::kernel, with `template` or `extern template`.
#define LORA_GROUPED_SEGMENTS_INSTANCES(prefix)                                  \
  prefix __global__ void lora_grouped_entries<__half>(LoraGroupedEntriesParams); \
  prefix __global__ void lora_grouped_count<__half>(LoraGroupedSegmentsParams);  \
  prefix __global__ void lora_grouped_scan<__half>(LoraGroupedSegmentsParams);   \
  prefix __global__ void lora_grouped_place<__half>(LoraGroupedSegmentsParams)
