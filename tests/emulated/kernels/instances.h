// The kernels' instances that the programs of kernels/ compile: whoever includes this links them
// rather than compile its own. Where a tool is to read all kernels in one file, it says
// ALL_KERNELS_IN_THIS_FILE.
#pragma once
#include "emulated/kernels/dequantize.h"
#include "emulated/kernels/lora_decode.h"
#include "emulated/kernels/lora_dsdb_sm80.h"
#include "emulated/kernels/lora_gemm_in_grid_sm90a.h"
#include "emulated/kernels/lora_gemm_sm80.h"
#include "emulated/kernels/lora_gemm_sm90a.h"
#include "emulated/kernels/lora_shrink_sm80.h"
#include "emulated/kernels/lora_split.h"
#include "emulated/kernels/lora_wgrad_sm80.h"

#ifndef ALL_KERNELS_IN_THIS_FILE
namespace lora_ext::kernel {

#define EXTERN_INSTANCES(variant, ...) DEQUANTIZE_INSTANCES(extern template, __VA_ARGS__)
DEQUANTIZE_VARIANTS(EXTERN_INSTANCES)
#undef EXTERN_INSTANCES
#define EXTERN_INSTANCE(variant, ...) extern LORA_DECODE_INSTANCE(__VA_ARGS__);
LORA_DECODE_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) extern LORA_DSDB_SM80_INSTANCE(__VA_ARGS__);
LORA_DSDB_SM80_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) extern LORA_GEMM_SM80_INSTANCE(__VA_ARGS__);
LORA_GEMM_SM80_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) extern LORA_SHRINK_SM80_INSTANCE(__VA_ARGS__);
LORA_SHRINK_SM80_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) extern LORA_SPLIT_INSTANCE(__VA_ARGS__);
LORA_SPLIT_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) extern LORA_WGRAD_SM80_INSTANCE(__VA_ARGS__);
LORA_WGRAD_SM80_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) LORA_GEMM_SM90A_INSTANCES(extern template, __VA_ARGS__)
LORA_GEMM_SM90A_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE
#define EXTERN_INSTANCE(variant, ...) \
  LORA_GEMM_IN_GRID_SM90A_INSTANCES(extern template, __VA_ARGS__)
LORA_GEMM_IN_GRID_SM90A_VARIANTS(EXTERN_INSTANCE)
#undef EXTERN_INSTANCE

extern LORA_REDUCE_INSTANCE(__nv_bfloat16);
extern LORA_REDUCE_INSTANCE(__half);
extern LORA_REDUCE_WGRAD_INSTANCE(__nv_bfloat16);
extern LORA_REDUCE_WGRAD_INSTANCE(__half);

}  // namespace lora_ext::kernel
#endif
