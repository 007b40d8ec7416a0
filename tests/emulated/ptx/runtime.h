// Runs what csrc/kernels/launch/, as nvcc compiles it, launches: kernels are nvcc's PTX.
#pragma once
#include <string>
#include <vector>

#include "emulated/cuda/runtime.h"
#include "emulator/ptx/library.h"

namespace emulated::ptx {

// Before and after launches of a card with so many resident clusters. end() throws what went wrong.
void begin(const emulator::Config& config, int64_t clusters);
void end(cudaError_t error);
// Of the launches since begin(): those with PDL, "N instructions in S s" of warps, and of each kernel
// "ARCH NAME: N of ALL", how many of its operations have ever been executed.
int programmatic_launches();
std::string speed();
std::vector<std::string> coverage();

}  // namespace emulated::ptx
