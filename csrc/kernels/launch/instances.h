// The instances of the sequences and kernels: each is compiled by one .cu file of this folder, for
// one type, so that they compile in parallel; the files that include this header link them.
//
//     lora_linear_*.cu      the sequence of one adapter, with its kernels for every card
//     lora_grouped_*.cu     the sequence of many adapters, with its kernels
//     lora_decode_*.cu      the kernel for few rows, for both sequences
//     lora_gemm_*sm90a*.cu  the kernels for Hopper, for the sequence of one adapter
#pragma once
#include "kernels/decode/launch.h"
#include "kernels/launch/stream_launch.h"
#include "kernels/sequence/grouped_sequence.h"
#include "kernels/sequence/linear_sequence.h"

#define LORA_EXT_DECODE(T, F)                                                          \
  void launch_lora_decode<T, F>(const plan::Decode&, const LoraDecodeParams<T>&, bool, \
                                cuda::StreamLaunch&)
#define LORA_EXT_GROUPED(Operands, T) \
  void launch_lora_grouped<T>(const plan::Plan&, const Operands&, cuda::StreamLaunch&)
#define LORA_EXT_LINEAR(Operands, T) \
  void launch_lora_linear<T>(const plan::Plan&, const Operands&, cuda::StreamLaunch&)
#define LORA_EXT_GEMM_SM90A(T) \
  void launch_lora_gemm_sm90a<T>(const LoraGemmParams<T>&, const Sm90aChoice&, cuda::StreamLaunch&)
#define LORA_EXT_GEMM_FUSED_SHRINK_SM90A(T)                                                   \
  void launch_lora_gemm_fused_shrink_sm90a<T>(                                                \
      const LoraGemmParams<T>&, const LoraFusedShrinkParams<T>&, const FusedShrinkFactor<T>&, \
      const Sm90aChoice&, cuda::StreamLaunch&)

namespace lora_ext::kernel {

extern template LORA_EXT_DECODE(__nv_bfloat16, __nv_bfloat16);
extern template LORA_EXT_DECODE(__nv_bfloat16, float);
extern template LORA_EXT_DECODE(__half, __half);
extern template LORA_EXT_DECODE(__half, float);
extern template LORA_EXT_GROUPED(LoraGroupedForward, __nv_bfloat16);
extern template LORA_EXT_GROUPED(LoraGroupedBackward, __nv_bfloat16);
extern template LORA_EXT_GROUPED(LoraGroupedForward, __half);
extern template LORA_EXT_GROUPED(LoraGroupedBackward, __half);
extern template LORA_EXT_LINEAR(LoraLinearForward, __nv_bfloat16);
extern template LORA_EXT_LINEAR(LoraLinearBackward, __nv_bfloat16);
extern template LORA_EXT_LINEAR(LoraLinearForward, __half);
extern template LORA_EXT_LINEAR(LoraLinearBackward, __half);
extern template LORA_EXT_GEMM_SM90A(__nv_bfloat16);
extern template LORA_EXT_GEMM_SM90A(__half);
extern template LORA_EXT_GEMM_FUSED_SHRINK_SM90A(__nv_bfloat16);
extern template LORA_EXT_GEMM_FUSED_SHRINK_SM90A(__half);

}  // namespace lora_ext::kernel
