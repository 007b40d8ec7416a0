#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/launch.h"
#include "emulated/kernels/lora_experts.h"

namespace lora_ext::kernel {

template <class T>
void launch_experts(emulator::Stream& stream, const ExpertsParams& params) {
  kernels::Launch launch{stream};
  std::visit([&](const auto& own) { enqueue<T>(launch, own); }, params);
}

#define LAUNCH(variant, T) template void launch_experts<T>(emulator::Stream&, const ExpertsParams&);
LORA_EXPERTS_VARIANTS(LAUNCH)

}  // namespace lora_ext::kernel
