// A kernel, and a program that runs it in the execution layer: ../README.md has the commands.
#include <cstdio>

#include "emulator/emulator.h"

__global__ void reverse(float* values, bool with_barrier) {
  const float value = values[blockDim.x - 1 - threadIdx.x];
  if (with_barrier) __syncthreads();
  values[threadIdx.x] = value;
}

int main(int argc, char**) try {
  const bool with_barrier = argc == 1;  // any argument leaves it out
  emulator::GlobalBuffer<float> values(256, "values");
  for (int i = 0; i < 256; ++i) values[i] = static_cast<float>(i);
  emulator::launch({.grid = 1, .block = 256}, reverse, values.data(), with_barrier);
  for (int i = 0; i < 256; ++i)
    if (values[i] != static_cast<float>(255 - i)) return std::printf("wrong at %d\n", i), 1;
  std::printf("reversed\n");
} catch (const emulator::Error& error) {
  std::printf("%s\n", error.what());
  return 1;
}
