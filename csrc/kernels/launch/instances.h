// The instances of the sequences and kernels, which instances.cu compiles: the files that include
// this header link them. Their types are __nv_bfloat16 and __half.
//
//     LORA_EXT_LINEAR      the sequence of one adapter, with its kernels for every card
//     LORA_EXT_GROUPED     the sequence of many adapters, with its kernels
//     LORA_EXT_DECODE      the kernel for few rows, for both sequences
//     LORA_EXT_GEMM_SM90A  the kernels for Hopper, for the sequence of one adapter, and of experts
#pragma once
#include "kernels/decode/launch.h"
#include "kernels/launch/stream_launch.h"
#include "kernels/sequence/grouped_sequence.h"
#include "kernels/sequence/linear_sequence.h"

// kind: `template`, or `extern template` where an instance is linked.
#define LORA_EXT_LINEAR(kind, T)                                                              \
  kind void launch_lora<T>(const plan::Plan&, const LoraLinearForward&, cuda::StreamLaunch&); \
  kind void launch_lora<T>(const plan::Plan&, const LoraLinearBackward&, cuda::StreamLaunch&);
#define LORA_EXT_GROUPED(kind, T)                                                              \
  kind void launch_lora<T>(const plan::Plan&, const LoraGroupedForward&, cuda::StreamLaunch&); \
  kind void launch_lora<T>(const plan::Plan&, const LoraGroupedBackward&, cuda::StreamLaunch&);
#define LORA_EXT_DECODE(kind, T)                                                                \
  kind void launch_lora_decode<T, T>(const plan::Decode&, const LoraDecodeParams<T>&, bool,     \
                                     cuda::StreamLaunch&);                                      \
  kind void launch_lora_decode<T, float>(const plan::Decode&, const LoraDecodeParams<T>&, bool, \
                                         cuda::StreamLaunch&);
#define LORA_EXT_GEMM_SM90A(kind, T)                                                           \
  kind void launch_lora_gemm_sm90a<T>(const LoraGemmParams<T>&, const Sm90aChoice&,            \
                                      cuda::StreamLaunch&);                                    \
  kind void launch_own_weights_sm90a<T>(const LoraOwnWeightsParams<T>&, bool, bool, bool, int, \
                                        cuda::StreamLaunch&);

#define LORA_EXT_ALL(kind, T) \
  LORA_EXT_LINEAR(kind, T)    \
  LORA_EXT_GROUPED(kind, T)   \
  LORA_EXT_DECODE(kind, T)    \
  LORA_EXT_GEMM_SM90A(kind, T)

namespace lora_ext::kernel {

LORA_EXT_ALL(extern template, __nv_bfloat16)
LORA_EXT_ALL(extern template, __half)

}  // namespace lora_ext::kernel
