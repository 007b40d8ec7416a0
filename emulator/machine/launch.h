// Launching kernels: emulator::launch runs one grid, a Stream runs several in order, with
// programmatic dependent launch.
#pragma once
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator/machine/machine.h"

namespace emulator {

/// Of a kernel that the host has no code of, what runs it on pointers to its arguments; null for
/// others. Set by who runs such kernels: the executor of PTX.
using DeviceKernel = std::function<void(void** arguments)>;
using DeviceKernels = std::function<DeviceKernel(const void* kernel, const LaunchConfig&)>;
DeviceKernels& device_kernels();

/// Grids that execute in order. They run inside synchronize(), or not at all.
class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Queues `kernel(args...)`. The arguments are copied once; every thread receives them by the
  /// kernel's own parameter types. Fails if the configuration breaks a launch limit.
  template <class... Parameters, class... Arguments>
  void launch(const LaunchConfig& launch_config, void (*kernel)(Parameters...),
              Arguments&&... arguments) {
    // Constructed in place: of a temporary, g++ 12 with -ftrivial-auto-var-init clears not only the
    // padding, if it holds an array of structs that have some.
    const auto parameters = std::make_shared<const std::tuple<std::decay_t<Parameters>...>>(
        std::forward<Arguments>(arguments)...);
    if (device_kernels()) {
      if (const auto run = device_kernels()(reinterpret_cast<const void*>(kernel), launch_config)) {
        enqueue({.grid = 1, .block = 1}, [run, parameters] {
          std::apply(
              [&](const auto&... each) {
                void* pointers[] = {const_cast<void*>(static_cast<const void*>(&each))..., nullptr};
                run(pointers);
              },
              *parameters);
        });
        return;
      }
    }
    enqueue(launch_config, [kernel, parameters] { std::apply(kernel, *parameters); });
  }
  /// The same for a callable without arguments.
  void launch(const LaunchConfig& launch_config, std::function<void()> kernel) {
    enqueue(launch_config, std::move(kernel));
  }

  /// Runs the queued grids to completion; throws Error at the first fault, after which the stream
  /// is empty.
  void synchronize();

 private:
  void enqueue(const LaunchConfig& launch_config, std::function<void()> body);
  std::vector<std::unique_ptr<Grid>> queue_;
};

/// Runs one grid to completion.
template <class Kernel, class... Arguments>
void launch(const LaunchConfig& launch_config, Kernel&& kernel, Arguments&&... arguments) {
  Stream stream;
  stream.launch(launch_config, std::forward<Kernel>(kernel), std::forward<Arguments>(arguments)...);
  stream.synchronize();
}

}  // namespace emulator
