// The instances of lora_grouped_segments' kernels that the tests run.
#pragma once
#include "kernel/lora_grouped_segments.h"

// To be used in namespace lora_ext::kernel, with `template` or `extern template`.
#define LORA_GROUPED_SEGMENTS_INSTANCES(prefix)                         \
  prefix __global__ void lora_grouped_count(LoraGroupedSegmentsParams); \
  prefix __global__ void lora_grouped_scan(LoraGroupedSegmentsParams);  \
  prefix __global__ void lora_grouped_place(LoraGroupedSegmentsParams)
