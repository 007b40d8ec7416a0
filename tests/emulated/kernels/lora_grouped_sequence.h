// The whole LoRA linear with many adapters in emulation: plans run as on a GPU, on a stream of the
// layer.
#pragma once
#include "emulated/kernels/instance.h"
#include "emulator/emulator.h"
#include "kernels/sequence/grouped_sequence.h"

namespace lora_ext::kernel {

template <class T>
void grouped_forward(emulator::Stream& stream, const plan::Plan& plan,
                     const LoraGroupedForward& operands);
template <class T>
void grouped_backward(emulator::Stream& stream, const plan::Plan& plan,
                      const LoraGroupedBackward& operands);

}  // namespace lora_ext::kernel
