// The whole LoRA linear, with one adapter and with many, and what surrounds experts, launched by the
// objects of nvcc, in place of kernels/lora_linear_sequence_kernels.cpp and its like.
#include <cuda_runtime.h>  // before the layer, whose macros it does not stand

#include "emulated/kernels/driver.h"
#include "emulated/kernels/lora_experts.h"
#include "emulated/kernels/lora_grouped_sequence.h"
#include "emulated/kernels/lora_linear_sequence.h"
#include "emulated/ptx/runtime.h"
#include "emulator/ptx/global.h"
#include "kernels/launch/instances.h"

namespace lora_ext::kernel {
namespace {

// What the stream holds comes first: PTX runs when it is launched. A grid before has written X and dY.
// Returns the launches with PDL.
template <class T, class Operands>
int run(emulator::Stream& stream, const plan::Plan& plan, const Operands& operands,
        int64_t clusters) {
  stream.synchronize();
  emulated::ptx::begin(emulator::config(), clusters);
  emulator::ptx::GlobalMemory& global = emulator::ptx::global_memory();
  global.written_before(operands.x);
  if constexpr (requires { operands.dy; }) global.written_before(operands.dy);
  cuda::StreamLaunch launch(emulator::cuda::stream_of(0, 0));
  launch_lora<T>(plan, operands, launch);
  emulated::ptx::end(launch.error());
  return emulated::ptx::programmatic_launches();
}

}  // namespace

template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands,
             int64_t clusters) {
  run<T>(stream, plan, operands, clusters);
}
template <class T>
int backward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearBackward& operands,
             int64_t clusters) {
  return run<T>(stream, plan, operands, clusters);
}
template <class T>
void grouped_forward(emulator::Stream& stream, const plan::Plan& plan,
                     const LoraGroupedForward& operands) {
  run<T>(stream, plan, operands, 1);
}
template <class T>
void grouped_backward(emulator::Stream& stream, const plan::Plan& plan,
                      const LoraGroupedBackward& operands) {
  run<T>(stream, plan, operands, 1);
}

template <class T>
void launch_experts(emulator::Stream& stream, const ExpertsParams& params) {
  stream.synchronize();
  emulated::ptx::begin(emulator::config(), 1);
  cuda::StreamLaunch launch(emulator::cuda::stream_of(0, 0));
  std::visit([&](const auto& own) { enqueue<T>(launch, own); }, params);
  emulated::ptx::end(launch.error());
}

#define SEQUENCES(T)                                                                        \
  template void forward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearForward&,  \
                           int64_t);                                                        \
  template int backward<T>(emulator::Stream&, const plan::Plan&, const LoraLinearBackward&, \
                           int64_t);                                                        \
  template void grouped_forward<T>(emulator::Stream&, const plan::Plan&,                    \
                                   const LoraGroupedForward&);                              \
  template void grouped_backward<T>(emulator::Stream&, const plan::Plan&,                   \
                                    const LoraGroupedBackward&);                            \
  template void launch_experts<T>(emulator::Stream&, const ExpertsParams&);
SEQUENCES(__nv_bfloat16)
SEQUENCES(__half)

}  // namespace lora_ext::kernel
