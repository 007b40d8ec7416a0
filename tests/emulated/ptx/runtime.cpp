// The part of the CUDA runtime that nvcc's own host code calls: it registers each kernel by its name
// in the PTX, and launches it by cudaLaunchKernelExC. The rest is cuda/runtime.cpp's.
#include "emulated/ptx/runtime.h"

#include <chrono>
#include <exception>
#include <filesystem>
#include <map>

#include "emulated/cuda/driver_state.h"
#include "emulated/kernels/driver.h"
#include "emulated/mutants/known_fault.h"
#include "emulator/ptx/global.h"

// What stands for each kernel of the PTX in host programs that name it, up to a null; written by
// build.py.
struct NamedKernel {
  const void* kernel;
  const char* name;
};
extern "C" const NamedKernel emulated_ptx_kernels[];

namespace emulated::ptx {
namespace {

using emulator::ptx::Library;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all = [] {
    std::map<const void*, std::string> named;
    for (const auto* each = ::emulated_ptx_kernels; each->kernel != nullptr; ++each)
      named[each->kernel] = each->name;
    return named;
  }();
  return all;
}

// Of one architecture, as build.py has put it there.
Library library_of(const char* arch) {
  Library library;
  for (const auto& file : std::filesystem::directory_iterator("build/emulator/ptx/units"))
    if (file.path().string().ends_with(std::string(".compute_") + arch + ".ptx"))
      library.add(file.path().string());
  return library;
}

struct State {
  Library of_80 = library_of("80"), of_90a = library_of("90a");
  Library* chosen = &of_80;
  std::string fault;
  emulator::Config config;
  std::exception_ptr failure;
  int programmatic = 0;
  std::map<const void*, std::string> told;  // the lines of each program that have run
};
State& state() {
  static State one;
  return one;
}

// The architecture whose PTX runs follows from the seed.
void choose(const emulator::Config& config) {
  state().config = config;
  state().chosen = config.seed % 2 ? &state().of_80 : &state().of_90a;
}

// A kernel of some cards alone is empty in the PTX of the others', and 8.0's has no griddepcontrol.
emulator::ptx::Program& program_of(const std::string& kernel, bool programmatic) {
  emulator::ptx::Library& first = programmatic ? state().of_90a : *state().chosen;
  emulator::ptx::Library& other = &first == &state().of_80 ? state().of_90a : state().of_80;
  emulator::ptx::Program& found = first.program(kernel);
  return found.operations.size() > 1 ? found : other.program(kernel);
}

void run(const std::string& name, const emulator::LaunchConfig& launch, void** arguments,
         bool programmatic) try {
  const auto start = std::chrono::steady_clock::now();
  const auto& [grid, block, cluster] = std::tie(launch.grid, launch.block, launch.cluster);
  emulator::ptx::Program& program = program_of(name, programmatic);
  const uint64_t instructions = emulator::ptx::launch(program,
                                                      {{grid.x, grid.y, grid.z},
                                                       {block.x, block.y, block.z},
                                                       {cluster.x, cluster.y, cluster.z},
                                                       launch.shared_bytes,
                                                       programmatic},
                                                      arguments, state().config);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::string& told = state().told[&program];
  std::string lines = lines_of(program, false);
  kernels::tell(
      emulator::format("%s %s: %llu instructions in %.6f s%s",
                       program.file.find("compute_80") == std::string::npos ? "90a" : "80",
                       name.c_str(), static_cast<unsigned long long>(instructions), seconds.count(),
                       lines == told ? "" : (", lines " + lines).c_str()));
  told = std::move(lines);
} catch (...) {  // which end() throws: a CUDA call returns only that it failed
  state().failure = std::current_exception();
  throw;
}

// Host programs that launch a kernel on a stream of the layer.
const bool kHooked = [] {
  emulator::device_kernels() = [](const void* kernel, const emulator::LaunchConfig& launch) {
    const auto found = names().find(kernel);
    if (found == names().end()) return emulator::DeviceKernel();
    choose(emulator::config());
    return emulator::DeviceKernel(
        [launch, name = found->second](void** arguments) { run(name, launch, arguments, false); });
  };
  return true;
}();

}  // namespace

void begin(const emulator::Config& config, int64_t clusters) {
  choose(config);
  for (emulator::cuda::Card& card : emulator::cuda::driver().cards)
    card = {.arch = 90, .sms = 1 << 20, .clusters = static_cast<int>(clusters)};
  state().programmatic = 0;
  emulator::ptx::global_memory().forget();
}

void end(cudaError_t error) {
  emulator::config() = state().config;
  if (const std::exception_ptr failure = std::exchange(state().failure, nullptr))
    std::rethrow_exception(failure);
  if (error != cudaSuccess)
    throw emulator::Error(emulator::ErrorKind::Misuse,
                          "a CUDA call failed: " + emulator::cuda::driver().record.str());
  emulator::cuda::driver().record.str("");
  emulator::ptx::global_memory().end_of_sequence();
}

int programmatic_launches() { return state().programmatic; }

}  // namespace emulated::ptx

using namespace emulated::ptx;

// A fault is a PTX file whose kernels stand in for those of the same names.
void emulated::plant_known_fault(const char* file) {
  if (state().fault == file) return;
  state().fault = file;
  if (*file == '\0') return;
  (std::string(file).find("90a") == std::string::npos ? state().of_80 : state().of_90a).add(file);
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* one = nullptr;
  return &one;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names()[kernel] = name;
}
// Of kernels that are launched by <<<>>>, which the project's are not.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
cudaError_t __cudaGetKernel(void**, const void*) { std::abort(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const std::string& name = names().at(kernel);
  bool programmatic = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    programmatic |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  state().programmatic += programmatic;
  return emulator::cuda::launch(*config, kernel, name.c_str(), {},
                                [&](emulator::Stream&, const emulator::LaunchConfig& launch) {
                                  run(name, launch, arguments, programmatic);
                                });
}

}  // extern "C"
