// Every kernel of the LoRA linear with planted faults, as the plans call for them.
#include "emulator/fault.h"
#include "emulator/kernels/lora_linear_sequence.h"
#include "emulator/kernels/tensor_map.h"
#include "kernel/lora_gemm_sm90a_launch.h"

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

  template <class T>
  void lora_gemm_sm90a(const LoraGemmParams<T>& params, const Sm90aChoice& choice) const {
    launch_lora_gemm_sm90a<T, emulator::PlantedFault>(params, choice, *this);
  }
  // What launch_lora_gemm_sm90a asks for.
  template <class T>
  CUtensorMap encode(const T* data, int rows, int columns, int64_t pitch, int box_rows) const {
    return kernels::tensor_map(data, rows, columns, pitch, box_rows);
  }
  template <class Kernel>
  int64_t clusters(Kernel, const Sm90aLaunch&) const {
    return 3;
  }
  template <class Params>
  void operator()(void (*kernel)(LoraGemmMaps, Params), const Sm90aLaunch& how,
                  const LoraGemmMaps& maps, const Params& params) const {
    stream.launch({.grid = how.grid,
                   .block = dim3(how.threads),
                   .cluster = how.cluster,
                   .shared_bytes = how.shared_bytes,
                   .programmatic_dependent = how.dependent},
                  kernel, maps, params);
  }
};

template <class T>
using Linear = LoraLinearSequence<T, emulator::PlantedFault, const Launch>;

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
