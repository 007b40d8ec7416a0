// lora_gemm on wgmma and TMA, launched on a stream of a card with compute capability 9.0.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernel/lora_gemm.h"
#include "kernel/lora_gemm_sm90a_choice.h"
#include "kernel/lora_gemm_sm90a_in_grid_params.h"

namespace lora_ext::cuda {

cudaError_t lora_gemm_sm90a(const kernel::LoraGemmParams<__nv_bfloat16>& params,
                            const kernel::Sm90aChoice& choice, cudaStream_t stream);
cudaError_t lora_gemm_sm90a(const kernel::LoraGemmParams<__half>& params,
                            const kernel::Sm90aChoice& choice, cudaStream_t stream);

// The same, with T made in the same grid, where the planner allows it (plan.cpp).
cudaError_t lora_gemm_in_grid_sm90a(const kernel::LoraGemmParams<__nv_bfloat16>& params,
                                    const kernel::LoraInGridParams<__nv_bfloat16>& in,
                                    const kernel::InGridFactor<__nv_bfloat16>& factor,
                                    const kernel::Sm90aChoice& choice, cudaStream_t stream);
cudaError_t lora_gemm_in_grid_sm90a(const kernel::LoraGemmParams<__half>& params,
                                    const kernel::LoraInGridParams<__half>& in,
                                    const kernel::InGridFactor<__half>& factor,
                                    const kernel::Sm90aChoice& choice, cudaStream_t stream);

}  // namespace lora_ext::cuda
