// Runs kernels as nvcc's PTX: what csrc/kernels/launch/, as nvcc compiles it, launches, and what host
// programs launch on a stream of the layer. Each launch tells the run "ARCH NAME: I instructions in
// S s, lines L": which of the kernel's lines this process has executed, if there are new ones.
#pragma once
#include "emulated/cuda/runtime.h"
#include "emulator/ptx/library.h"

namespace emulated::ptx {

// Before and after launches of a card with so many resident clusters. end() throws what went wrong.
void begin(const emulator::Config& config, int64_t clusters);
void end(cudaError_t error);
int programmatic_launches();  // since begin(), those with PDL

}  // namespace emulated::ptx
