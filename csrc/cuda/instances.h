// The instances that the files of this folder compile for one type each, so that they compile in
// parallel; files that include this header link them. lora_linear_*.cu has the sequence and its
// kernels, the others have those for Hopper.
#pragma once
#include "cuda/decode_instances.h"
#include "cuda/stream_launch.h"
#include "kernel/lora_linear_sequence.h"

#define LORA_EXT_LINEAR(Operands, T) \
  void launch_lora_linear<T>(const plan::Plan&, const Operands&, cuda::StreamLaunch&)
#define LORA_EXT_GEMM_SM90A(T) \
  void launch_lora_gemm_sm90a<T>(const LoraGemmParams<T>&, const Sm90aChoice&, cuda::StreamLaunch&)
#define LORA_EXT_GEMM_IN_GRID_SM90A(T)                                                         \
  void launch_lora_gemm_in_grid_sm90a<T>(const LoraGemmParams<T>&, const LoraInGridParams<T>&, \
                                         const InGridFactor<T>&, const Sm90aChoice&,           \
                                         cuda::StreamLaunch&)

namespace lora_ext::kernel {

extern template LORA_EXT_LINEAR(LoraLinearForward, __nv_bfloat16);
extern template LORA_EXT_LINEAR(LoraLinearBackward, __nv_bfloat16);
extern template LORA_EXT_LINEAR(LoraLinearForward, __half);
extern template LORA_EXT_LINEAR(LoraLinearBackward, __half);
extern template LORA_EXT_GEMM_SM90A(__nv_bfloat16);
extern template LORA_EXT_GEMM_SM90A(__half);
extern template LORA_EXT_GEMM_IN_GRID_SM90A(__nv_bfloat16);
extern template LORA_EXT_GEMM_IN_GRID_SM90A(__half);

}  // namespace lora_ext::kernel
