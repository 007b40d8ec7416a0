// The grids before and after a kernel under test, where a grid may start before the one before it
// has ended.
#pragma once
#include "emulated/kernels/instance.h"
#include "emulator/emulator.h"
#include "ptx/sync.h"

namespace kernels {

// Each thread of the grid calls visit(i) for its part of `count`.
template <class Visit>
inline void for_each_of_grid(int count, const Visit& visit) {
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += threads)
    visit(i);
}

// to = from; the next grid may start at once.
template <class V>
__global__ void copy(const V* from, V* to, int count) {
  lora_ext::ptx::griddepcontrol_launch_dependents();
  for_each_of_grid(count, [&](int i) { to[i] = from[i]; });
}

// The same for a grid beside the one before, for data that that one waited for.
template <class V>
__global__ void copy_early(const V* from, V* to, int count) {
  for_each_of_grid(count, [&](int i) { to[i] = from[i]; });
  if (blockIdx.x == 0) lora_ext::ptx::griddepcontrol_wait();
}

// Takes the place of dX before wgrad: y = 1, and wgrad may start when the grid before has ended.
template <class V>
__global__ void make_product(V* y, int size) {
  lora_ext::ptx::griddepcontrol_wait();
  lora_ext::ptx::fence_acq_rel_gpu();
  lora_ext::ptx::griddepcontrol_launch_dependents();
  for (int i = 0; i < 20; ++i) __syncthreads();
  for_each_of_grid(size, [&](int i) { y[i] = 1; });
}

#define NEIGHBOURS(V)                  \
  INSTANCE(copy<V>(const V*, V*, int)) \
  INSTANCE(copy_early<V>(const V*, V*, int))
INSTANCE(make_product<float>(float*, int))
NEIGHBOURS(float)
NEIGHBOURS(__nv_bfloat16)
NEIGHBOURS(__half)

}  // namespace kernels
