// lora_decode: lora_decode_bf16.cu and lora_decode_fp16.cu compile it, one type each; files that
// include this header link them.
#pragma once
#include "cuda/stream_launch.h"
#include "kernel/lora_decode_launch.h"

#define LORA_EXT_DECODE(T, F)                                                          \
  void launch_lora_decode<T, F>(const plan::Decode&, const LoraDecodeParams<T>&, bool, \
                                cuda::StreamLaunch&)

namespace lora_ext::kernel {

extern template LORA_EXT_DECODE(__nv_bfloat16, __nv_bfloat16);
extern template LORA_EXT_DECODE(__nv_bfloat16, float);
extern template LORA_EXT_DECODE(__half, __half);
extern template LORA_EXT_DECODE(__half, float);

}  // namespace lora_ext::kernel
