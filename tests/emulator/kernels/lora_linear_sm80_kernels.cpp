// Every kernel of the LoRA linear with planted faults, as the plans call for them.
#include "emulator/fault.h"
#include "emulator/kernels/lora_linear_sm80.h"

namespace lora_ext::kernel {
namespace {

struct Launch {
  emulator::Stream& stream;
  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params) const {
    stream.launch({.grid = grid, .block = dim3(threads), .shared_bytes = shared_bytes}, kernel,
                  params);
  }
};

template <class T>
using Linear = LoraLinearSm80<T, emulator::PlantedFault, const Launch>;

}  // namespace

template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands) {
  const Launch launch{stream};
  Linear<T>(plan, operands, launch).forward(operands);
}
template <class T>
void backward(emulator::Stream& stream, const plan::Plan& plan,
              const LoraLinearBackward& operands) {
  const Launch launch{stream};
  Linear<T>(plan, operands, launch).backward(operands);
}

#define INSTANCE(T)                                                                         \
  template void forward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearForward&); \
  template void backward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearBackward&);
INSTANCE(__nv_bfloat16)
INSTANCE(__half)

}  // namespace lora_ext::kernel
