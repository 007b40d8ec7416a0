// The instances of the sequences and kernels: each is compiled by one .cu file of this folder, for
// one type, so that they compile in parallel; the files that include this header link them. Their
// types are LORA_EXT_HALVES.
//
//     lora_linear_*.cu      the sequence of one adapter, with its kernels for every card
//     lora_grouped_*.cu     the sequence of many adapters, with its kernels
//     lora_decode_*.cu      the kernel for few rows, for both sequences
//     lora_gemm_*sm90a*.cu  the kernels for Hopper, for the sequence of one adapter
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "kernels/decode/launch.h"
#include "kernels/launch/stream_launch.h"
#include "kernels/sequence/grouped_sequence.h"
#include "kernels/sequence/linear_sequence.h"

// X(type of the kernels, its dtype)
#define LORA_EXT_HALVES(X)    \
  X(__nv_bfloat16, kBFloat16) \
  X(__half, kFloat16)

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

#define LORA_EXT_EXTERN(T, kDtype)                          \
  extern template LORA_EXT_DECODE(T, T);                    \
  extern template LORA_EXT_DECODE(T, float);                \
  extern template LORA_EXT_GROUPED(LoraGroupedForward, T);  \
  extern template LORA_EXT_GROUPED(LoraGroupedBackward, T); \
  extern template LORA_EXT_LINEAR(LoraLinearForward, T);    \
  extern template LORA_EXT_LINEAR(LoraLinearBackward, T);   \
  extern template LORA_EXT_GEMM_SM90A(T);                   \
  extern template LORA_EXT_GEMM_FUSED_SHRINK_SM90A(T);
#define LORA_EXT_CALL_IF(T, kDtype) call_if(Dtype::kDtype, std::type_identity<T>());

namespace lora_ext::kernel {

LORA_EXT_HALVES(LORA_EXT_EXTERN)

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Calls call(std::type_identity<T>()) for the type T of a dtype. Returns whether there is one.
template <class Call>
bool with_half(Dtype dtype, const Call& call) {
  bool found = false;
  const auto call_if = [&](Dtype each, auto type) {
    if (each == dtype) call(type), found = true;
  };
  LORA_EXT_HALVES(LORA_EXT_CALL_IF)
  return found;
}

}  // namespace lora_ext::cuda
