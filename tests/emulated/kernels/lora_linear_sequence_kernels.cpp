// Every kernel of the LoRA linear, as the plans call for them.
#include "emulated/kernels/cluster_launch.h"
#include "emulated/kernels/instances.h"
#include "emulated/kernels/lora_linear_sequence.h"
#include "emulated/kernels/neighbours.h"

namespace lora_ext::kernel {
namespace {

void clear_flags(uint32_t* flags, int64_t count) {
  for (int64_t i = 0; i < count; ++i) flags[i] = 0;
}

struct Launch : kernels::ClusterLaunch {
  int early_launches = 0;

  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params, bool early = false) {
    early_launches += early;
    stream.launch({.grid = grid,
                   .block = dim3(threads),
                   .shared_bytes = shared_bytes,
                   .programmatic_dependent = early},
                  kernel, params);
  }
  template <class... Params>
  void operator()(void (*kernel)(Params...), const Sm90aLaunch& how, const Params&... params) {
    early_launches += how.dependent;
    ClusterLaunch::operator()(kernel, how, params...);
  }
  void clear(uint32_t* flags, int64_t count) const {
    stream.launch({.grid = dim3(1), .block = dim3(1)}, clear_flags, flags, count);
  }
};

}  // namespace

template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands,
             int64_t clusters) {
  Launch launch{{stream, clusters}};
  launch_lora_linear<T>(plan, operands, launch);
}
template <class T>
int backward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearBackward& operands,
             int64_t clusters) {
  Launch launch{{stream, clusters}};
  launch_lora_linear<T>(plan, operands, launch);
  return launch.early_launches;
}

#define INSTANCE(T)                                                                         \
  template void forward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearForward&,  \
                           int64_t);                                                        \
  template int backward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearBackward&, \
                           int64_t);
INSTANCE(__nv_bfloat16)
INSTANCE(__half)

}  // namespace lora_ext::kernel

namespace kernels {

NEIGHBOUR_COPY(__nv_bfloat16);
NEIGHBOUR_COPY(__half);

}  // namespace kernels
