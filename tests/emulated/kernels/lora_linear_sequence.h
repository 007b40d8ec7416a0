// The whole LoRA linear in emulation: plans run as they run on a GPU, on a stream of the layer.
#pragma once
#include "emulator/emulator.h"
#include "kernels/sequence/linear_sequence.h"

namespace lora_ext::kernel {

// On a card with this number of resident clusters.
template <class T>
void forward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearForward& operands,
             int64_t clusters);
// Returns how many kernels were launched with PDL.
template <class T>
int backward(emulator::Stream& stream, const plan::Plan& plan, const LoraLinearBackward& operands,
             int64_t clusters);

}  // namespace lora_ext::kernel
