// The part of the CUDA runtime that csrc/kernels/launch/ uses, compiled by g++: checks its
// arguments, keeps a record, runs kernels in the execution layer, and fails where a test wants it
// to.
//
// Included before each source of csrc/kernels/launch/ (-include), so that these launch what they
// launch on a GPU. runtime.cpp has the functions of cuda_runtime_api.h, launches.cpp those of launches.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <string>
#include <tuple>
#include <typeinfo>

#include "emulated/cuda/counting.h"
#include "emulator/emulator.h"

namespace emulator::cuda {

// Two devices, of one kind unless a test says otherwise, with streams numbered from 0, the default.
// A thread has a current device, and of each device a current stream.
constexpr int kDevices = 2;
int current_device();
void set_current_device(int device);
int current_stream(int device);
void set_current_stream(int device, int number);
cudaStream_t stream_of(int device, int number);

// The driver's library, as device.cu opens it.
void* open_driver(const char* name, int mode);
void* find_in_driver(void* driver, const char* function);

// Queues the kernel on a stream of the layer.
using Enqueue = std::function<void(Stream&, const LaunchConfig&)>;
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* parameters,
                   const Addresses& addresses, const Enqueue& enqueue);

// A kernel's parameters without the pointers that it is given but reads nothing at: those of a
// product of no steps, and of factors of which it makes a table.
template <class Params>
Params as_read(Params params) {
  const auto without_steps = [](auto& gemm) {
    if (gemm.k == 0) gemm.p = nullptr, gemm.q = nullptr;
  };
  if constexpr (requires { params.p, params.q, params.k; }) without_steps(params);
  if constexpr (requires { params.gemm.k; }) without_steps(params.gemm);
  if constexpr (requires { params.factors.a, params.chunks(); })
    params.factors.a = nullptr, params.factors.b = nullptr;
  return params;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel_ex(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                             const Arguments&... arguments) {
  Addresses addresses;
  const auto add = [&](const auto& read) { addresses.add(&read, sizeof read); };
  if (is_counting()) (add(as_read(arguments)), ...);
  return launch(*config, reinterpret_cast<const void*>(kernel),
                typeid(std::tuple<Parameters...>).name(), addresses,
                [&](Stream& stream, const LaunchConfig& launch_config) {
                  stream.launch(launch_config, kernel, arguments...);
                });
}

// One of the sizes of the grid or the block that a thread is in.
template <const dim3& (*kDimensions)(), unsigned dim3::* kSize>
struct Size {
  operator unsigned() const { return kDimensions().*kSize; }
};
template <const dim3& (*kDimensions)()>
struct Dimensions {
  Size<kDimensions, &dim3::x> x;
  Size<kDimensions, &dim3::y> y;
  Size<kDimensions, &dim3::z> z;
};

}  // namespace emulator::cuda

// Objects as in CUDA, instead of the layer's macros: launch configurations have members of the same
// names.
#undef gridDim
#undef blockDim
inline constexpr emulator::cuda::Dimensions<emulator::grid_dimensions> gridDim;
inline constexpr emulator::cuda::Dimensions<emulator::block_dimensions> blockDim;

#include <dlfcn.h>
#define dlopen ::emulator::cuda::open_driver
#define dlsym ::emulator::cuda::find_in_driver

// The header's own version takes untyped pointers, from which no kernel can be called here.
#define cudaLaunchKernelEx ::emulator::cuda::launch_kernel_ex
