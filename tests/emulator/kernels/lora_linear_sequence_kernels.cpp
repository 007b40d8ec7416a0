// Every kernel of the LoRA linear, as the plans call for them.
#include "emulator/kernels/cluster_launch.h"
#include "emulator/kernels/instances.h"
#include "emulator/kernels/lora_linear_sequence.h"
#include "emulator/kernels/neighbours.h"
#include "kernel/lora_gemm_sm90a_in_grid_launch.h"

namespace lora_ext::kernel {
namespace {

void clear_flags(uint32_t* flags, int64_t count) {
  for (int64_t i = 0; i < count; ++i) flags[i] = 0;
}

struct Launch {
  emulator::Stream& stream;
  int64_t clusters;
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

  template <class T>
  void lora_gemm_sm90a(const LoraGemmParams<T>& params, const Sm90aChoice& choice) {
    early_launches += choice.dependent;
    kernels::ClusterLaunch launch{stream, clusters};
    launch_lora_gemm_sm90a<T>(params, choice, launch);
  }
  template <class T>
  void lora_gemm_in_grid_sm90a(const LoraGemmParams<T>& params, const LoraInGridParams<T>& in,
                               const InGridFactor<T>& factor, const Sm90aChoice& choice) const {
    kernels::ClusterLaunch launch{stream, clusters};
    launch_lora_gemm_in_grid_sm90a<T>(params, in, factor, choice, launch);
  }
  void clear(uint32_t* flags, int64_t count) const {
    stream.launch({.grid = dim3(1), .block = dim3(1)}, clear_flags, flags, count);
  }
};

template <class T>
using Linear = LoraLinearSequence<T, Launch>;

}  // namespace

template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands,
             int64_t clusters) {
  Launch launch{stream, clusters};
  Linear<T>(plan, operands, launch).forward(operands);
}
template <class T>
int backward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearBackward& operands,
             int64_t clusters) {
  Launch launch{stream, clusters};
  Linear<T>(plan, operands, launch).backward(operands);
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
