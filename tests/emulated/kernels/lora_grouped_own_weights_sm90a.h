// The instances of lora_grouped_gemm_own_weights_sm90a that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/own_weights_sm90a.h"

// X(variant, T, tile, Q is MN-major, U is MN-major, masked)
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_OWN_WEIGHTS_SM90A_VARIANTS(X)                  \
  EVERY_HALF(X, , OwnWeightsTile, false, false, false)              \
  EVERY_HALF(X, _transposed, OwnWeightsTile, true, false, false)    \
  EVERY_HALF(X, _dx, OwnWeightsTile, true, true, false)             \
  EVERY_HALF(X, _dx_masked, OwnWeightsTile, true, true, true)       \
  EVERY_HALF(X, _dx_transposed, OwnWeightsTile, false, true, false) \
  EVERY_HALF(X, _dx_transposed_masked, OwnWeightsTile, false, true, true)
#else
#define LORA_GROUPED_OWN_WEIGHTS_SM90A_VARIANTS(X)                 \
  X(bf16, __nv_bfloat16, OwnWeightsTile, false, false, false)      \
  X(transposed, __nv_bfloat16, OwnWeightsTile, true, false, false) \
  X(dx_masked, __nv_bfloat16, OwnWeightsTile, true, true, true)    \
  X(dx_transposed, __half, OwnWeightsTile, false, true, false)
#endif

#define LORA_GROUPED_OWN_WEIGHTS_SM90A_INSTANCES(variant, T, Tile, mn_major, u_mn_major, masked) \
  INSTANCE(lora_grouped_gemm_own_weights_sm90a<T, mn_major, u_mn_major, masked>(                 \
      LoraGemmMaps, LoraOwnWeightsParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_OWN_WEIGHTS_SM90A_VARIANTS(LORA_GROUPED_OWN_WEIGHTS_SM90A_INSTANCES)
}  // namespace lora_ext::kernel
