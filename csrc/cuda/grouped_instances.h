// The sequence for many adapters: lora_grouped_bf16.cu and lora_grouped_fp16.cu compile it with its
// kernels, one type each; files that include this header link them.
#pragma once
#include "cuda/decode_instances.h"
#include "cuda/stream_launch.h"
#include "kernel/lora_grouped_sequence.h"

#define LORA_EXT_GROUPED(Operands, T) \
  void launch_lora_grouped<T>(const plan::Plan&, const Operands&, cuda::StreamLaunch&)

namespace lora_ext::kernel {

extern template LORA_EXT_GROUPED(LoraGroupedForward, __nv_bfloat16);
extern template LORA_EXT_GROUPED(LoraGroupedBackward, __nv_bfloat16);
extern template LORA_EXT_GROUPED(LoraGroupedForward, __half);
extern template LORA_EXT_GROUPED(LoraGroupedBackward, __half);

}  // namespace lora_ext::kernel
