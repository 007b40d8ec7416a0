// All instances of the kernels around the products of a mixture's experts.
#pragma once
#include "emulated/kernels/instance.h"
#include "emulator/emulator.h"
#include "kernels/experts/launch.h"

// X(variant, T)
#define LORA_EXPERTS_VARIANTS(X) \
  X(bf16, __nv_bfloat16)         \
  X(fp16, __half)

#define LORA_EXPERTS_INSTANCES(variant, T)                \
  INSTANCE(lora_experts_factors<T>(ExpertsFactorsParams)) \
  INSTANCE(lora_experts_sum<T>(ExpertsSumParams))         \
  INSTANCE(lora_experts_dot<T>(ExpertsDotParams))
#define LORA_EXPERTS_SORTS(Index)                        \
  INSTANCE(lora_experts_count<Index>(ExpertsSortParams)) \
  INSTANCE(lora_experts_begin<Index>(ExpertsSortParams)) \
  INSTANCE(lora_experts_place<Index>(ExpertsSortParams)) \
  INSTANCE(lora_experts_routes<Index>(ExpertsSortParams))
namespace lora_ext::kernel {
LORA_EXPERTS_VARIANTS(LORA_EXPERTS_INSTANCES)
LORA_EXPERTS_SORTS(int)
LORA_EXPERTS_SORTS(int64_t)

// As csrc/kernels/launch/experts.cu launches them.
template <class T>
void launch_experts(emulator::Stream& stream, const ExpertsParams& params);
}  // namespace lora_ext::kernel
