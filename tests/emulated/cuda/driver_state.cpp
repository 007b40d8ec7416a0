#include "emulated/cuda/driver_state.h"

#include <iterator>

#include "emulated/mutants/known_fault.h"

namespace emulator::cuda {

Driver& driver() {
  static auto& one = *new Driver();  // never destroyed: at the end threads may still wait in it
  return one;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;
thread_local int streams_of_thread[kDevices] = {};  // the number of each device's current stream
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

int shared_per_block(int device) {
  const int arch = driver().cards[device].arch;
  return arch == 86 ? 101376 : arch == 90 ? 232448 : 166912;
}

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refuse(cudaError_t error, const std::string& reason) {
  driver().record << R"({"refused": ")" << reason << "\"}\n";
  return done(error);
}

int planned_failure(const char* call) {
  auto& failing = driver().failing;
  const auto found = failing.find(call);
  if (found == failing.end() || --found->second.first > 0) return 0;
  const int error = found->second.second;
  failing.erase(found);
  return error;
}

cudaError_t begin(const char* call) {
  while (driver().loads == call && driver().busy == device_of_thread) {
    ++driver().waiting;
    driver().idle.wait(driver().mutex);
  }
  if (driver().version < CUDART_VERSION / 1000 * 1000)
    return done(driver().version == 0 ? cudaErrorNoDevice : cudaErrorInsufficientDriver);
  return done(static_cast<cudaError_t>(planned_failure(call)));
}

int current_device() { return device_of_thread; }
void set_current_device(int device) { device_of_thread = device; }
int current_stream(int device) { return streams_of_thread[device]; }
void set_current_stream(int device, int number) { streams_of_thread[device] = number; }
cudaStream_t stream_of(int device, int number) {
  return reinterpret_cast<cudaStream_t>(uintptr_t{16} * (number * kDevices + device + 1));
}

bool is_current(cudaStream_t stream) {
  return stream == stream_of(device_of_thread, current_stream(device_of_thread));
}

}  // namespace emulator::cuda

using namespace emulator::cuda;

extern "C" {

// For tests, by ctypes.

void emulated_cuda_be(int arch, int version, int capturing) {
  for (Card& card : driver().cards) card = {.arch = arch};
  driver().version = version, driver().capturing = capturing != 0;
}
// From now on one of the devices is another card than the other.
void emulated_cuda_be_unlike(int device, int arch, int sms, int clusters) {
  driver().cards[device] = {arch, sms, clusters};
}
void emulated_cuda_plant(const char* mutant) { emulated::plant_known_fault(mutant); }
// The nth call from now of a function fails with an error.
void emulated_cuda_fail(const char* call, int nth, int error) {
  driver().failing[call] = {nth, error};
}
// From now on work on this device does not end; -1: it all ends.
void emulated_cuda_keep_busy(int device) {
  const std::lock_guard lock(driver().mutex);
  driver().busy = device, driver().waiting = 0;
  driver().idle.notify_all();
}
// From now on a call of this function loads a kernel, which may wait for work on the device.
void emulated_cuda_load_in(const char* call) {
  const std::lock_guard lock(driver().mutex);
  driver().loads = call;
}
// How often something has asked whether that work has ended, or has begun to wait for it.
int emulated_cuda_waiting() {
  const std::lock_guard lock(driver().mutex);
  return driver().waiting;
}
// Whether a failure that was asked for has not happened.
int emulated_cuda_still_to_fail() { return static_cast<int>(driver().failing.size()); }
// The records since the last call of this function.
const char* emulated_cuda_record() {
  driver().read = driver().record.str();
  driver().record.str("");
  return driver().read.c_str();
}
// What cudaGetLastError would return and clear.
int emulated_cuda_last_error() { return last_error; }
void emulated_cuda_set_device(int device) { set_current_device(device); }
int emulated_cuda_device() { return current_device(); }
// The current stream of a device in this thread.
void emulated_cuda_set_stream(int device, int number) { set_current_stream(device, number); }
int emulated_cuda_stream(int device) { return current_stream(device); }
// The device of what cudaMalloc has returned, from its first byte up to that of the next; -1 for
// none.
int emulated_cuda_device_of(const void* data) {
  const std::lock_guard lock(driver().mutex);
  const auto next = driver().device_of_memory.upper_bound(data);
  return next == driver().device_of_memory.begin() ? -1 : std::prev(next)->second;
}

}  // extern "C"
