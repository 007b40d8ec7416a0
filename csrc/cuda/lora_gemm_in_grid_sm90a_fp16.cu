#include "cuda/cluster_launch.h"
#include "cuda/lora_gemm_sm90a.h"
#include "kernel/lora_gemm_sm90a_in_grid_launch.h"

namespace lora_ext::cuda {

cudaError_t lora_gemm_in_grid_sm90a(const kernel::LoraGemmParams<__half>& params,
                                    const kernel::LoraInGridParams<__half>& in,
                                    const kernel::InGridFactor<__half>& factor,
                                    const kernel::Sm90aChoice& choice, cudaStream_t stream) {
  ClusterLaunch launch(stream);
  kernel::launch_lora_gemm_in_grid_sm90a<__half>(params, in, factor, choice, launch);
  return launch.error();
}

}  // namespace lora_ext::cuda
