// Every kernel of the LoRA linear with many adapters, as the plans call for them.
#include "emulated/kernels/instances.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/lora_grouped_sequence.h"

namespace lora_ext::kernel {

template <class T>
void grouped_forward(emulator::Stream& stream, const plan::Plan& plan,
                     const LoraGroupedForward& operands) {
  kernels::Launch launch{stream};
  launch_lora<T>(plan, operands, launch);
}
template <class T>
void grouped_backward(emulator::Stream& stream, const plan::Plan& plan,
                      const LoraGroupedBackward& operands) {
  kernels::Launch launch{stream};
  launch_lora<T>(plan, operands, launch);
}

#define SEQUENCE(T)                                                       \
  template void grouped_forward<T>(emulator::Stream&, const plan::Plan&,  \
                                   const LoraGroupedForward&);            \
  template void grouped_backward<T>(emulator::Stream&, const plan::Plan&, \
                                    const LoraGroupedBackward&);
SEQUENCE(__nv_bfloat16)
IF_BOTH_TYPES(SEQUENCE(__half))

}  // namespace lora_ext::kernel
