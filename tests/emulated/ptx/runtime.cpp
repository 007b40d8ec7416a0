// The part of the CUDA runtime that nvcc's own host code calls: it registers each kernel by its name
// in the PTX, and launches it by cudaLaunchKernelExC. The rest is cuda/runtime.cpp's.
#include "emulated/ptx/runtime.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <set>

#include "emulated/cuda/driver_state.h"
#include "emulated/mutants/known_fault.h"

namespace emulated::ptx {
namespace {

using emulator::ptx::Library;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
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
  uint64_t instructions = 0;
  double seconds = 0;
  int programmatic = 0;
  std::set<std::pair<std::string, const emulator::ptx::Program*>> launched;
};
State& state() {
  static State one;
  return one;
}

// sm_90a's own kernels are empty in the PTX of other architectures.
emulator::ptx::Program& program_of(const std::string& kernel) {
  emulator::ptx::Program* found = &state().chosen->program(kernel);
  if (found->operations.size() == 1) found = &state().of_90a.program(kernel);
  state().launched.emplace(kernel, found);
  return *found;
}

}  // namespace

void begin(const emulator::Config& config, int64_t clusters) {
  state().config = config;
  state().chosen = config.seed % 2 ? &state().of_80 : &state().of_90a;
  for (emulator::cuda::Card& card : emulator::cuda::driver().cards)
    card = {.arch = 90, .sms = 1 << 20, .clusters = static_cast<int>(clusters)};
  state().programmatic = 0, state().instructions = 0, state().seconds = 0;
  state().launched.clear();
}

void end(cudaError_t error) {
  emulator::config() = state().config;
  if (const std::exception_ptr failure = std::exchange(state().failure, nullptr))
    std::rethrow_exception(failure);
  if (error != cudaSuccess)
    throw emulator::Error(emulator::ErrorKind::Misuse,
                          "a CUDA call failed: " + emulator::cuda::driver().record.str());
  emulator::cuda::driver().record.str("");
}

int programmatic_launches() { return state().programmatic; }
std::string speed() {
  return emulator::format("%llu instructions in %.6f s",
                          static_cast<unsigned long long>(state().instructions), state().seconds);
}

std::vector<std::string> coverage() {
  std::vector<std::string> lines;
  for (const auto& [kernel, program] : state().launched) {
    const auto ran = std::count_if(program->runs.begin(), program->runs.end(),
                                   [](uint64_t runs) { return runs != 0; });
    const char* arch = program == &state().of_80.program(kernel) ? "80" : "90a";
    lines.push_back(
        emulator::format("%s %s: %zd of %zu", arch, kernel.c_str(), ran, program->runs.size()));
  }
  return lines;
}

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
  for (unsigned i = 0; i < config->numAttrs; ++i)
    state().programmatic +=
        config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  return emulator::cuda::launch(
      *config, kernel, name.c_str(), [&](emulator::Stream&, const emulator::LaunchConfig& launch) {
        const auto& [grid, block, cluster] = std::tie(launch.grid, launch.block, launch.cluster);
        const auto start = std::chrono::steady_clock::now();
        try {
          state().instructions += emulator::ptx::launch(
              program_of(name),
              {{grid.x, grid.y, grid.z},
               {block.x, block.y, block.z},
               {cluster.x, cluster.y, cluster.z},
               launch.shared_bytes},
              arguments, state().config);
        } catch (...) {
          state().failure = std::current_exception();
          throw;
        }
        state().seconds +=
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
}

}  // extern "C"
