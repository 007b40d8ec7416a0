// Every kernel of the LoRA linear, as the plans call for them.
#include "emulated/kernels/instances.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/lora_linear_sequence.h"

namespace lora_ext::kernel {

template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands,
             int64_t clusters) {
  kernels::Launch launch{stream, clusters};
  launch_lora<T>(plan, operands, launch);
}
template <class T>
int backward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearBackward& operands,
             int64_t clusters) {
  kernels::Launch launch{stream, clusters};
  launch_lora<T>(plan, operands, launch);
  return launch.pdl_launches;
}

#define SEQUENCE(T)                                                                         \
  template void forward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearForward&,  \
                           int64_t);                                                        \
  template int backward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearBackward&, \
                           int64_t);
SEQUENCE(__nv_bfloat16)
SEQUENCE(__half)

}  // namespace lora_ext::kernel
