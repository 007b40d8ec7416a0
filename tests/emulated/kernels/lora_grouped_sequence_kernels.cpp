// Every kernel of the LoRA linear with many adapters, as the plans call for them.
#include "emulated/kernels/lora_grouped_sequence.h"

namespace lora_ext::kernel {
namespace {

void clear_flags(uint32_t* flags, int64_t count) {
  for (int64_t i = 0; i < count; ++i) flags[i] = 0;
}

struct Launch {
  emulator::Stream& stream;

  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params) const {
    stream.launch({.grid = grid, .block = dim3(threads), .shared_bytes = shared_bytes}, kernel,
                  params);
  }
  void clear(uint32_t* flags, int64_t count) const {
    stream.launch({.grid = dim3(1), .block = dim3(1)}, clear_flags, flags, count);
  }
};

}  // namespace

template <class T>
void grouped_forward(emulator::Stream& stream, const plan::GroupedPlan& plan,
                     const LoraGroupedForward& operands) {
  Launch launch{stream};
  launch_lora_grouped<T>(plan, operands, launch);
}
template <class T>
void grouped_backward(emulator::Stream& stream, const plan::GroupedPlan& plan,
                      const LoraGroupedBackward& operands) {
  Launch launch{stream};
  launch_lora_grouped<T>(plan, operands, launch);
}

#define INSTANCE(T)                                                              \
  template void grouped_forward<T>(emulator::Stream&, const plan::GroupedPlan&,  \
                                   const LoraGroupedForward&);                   \
  template void grouped_backward<T>(emulator::Stream&, const plan::GroupedPlan&, \
                                    const LoraGroupedBackward&);
INSTANCE(__nv_bfloat16)
INSTANCE(__half)

}  // namespace lora_ext::kernel
