// What the emulated driver knows: its devices, each thread's place, what a test wants of it, and the
// record of its calls.
#pragma once
#include <condition_variable>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>

#include "emulated/cuda/runtime.h"

namespace emulator::cuda {

// What a device is. Clusters of two that are resident at a time may be fewer than its SMs have room
// for.
struct Card {
  int arch = 90, sms = 8, clusters = 4;
};

// State that tests set, and that they read. Kernels run one at a time: the layer has one machine.
struct Driver {
  std::recursive_mutex mutex;
  Card cards[kDevices];
  int version = CUDART_VERSION;
  bool capturing = false;
  int busy = -1;      // the device whose streams never end, or -1
  int waiting = 0;    // queries that have been answered so, and loads
  std::string loads;  // the call that loads a kernel: it waits for them
  std::condition_variable_any idle;
  std::map<std::string, std::pair<int, int>> failing;       // call -> which one from now, error
  std::map<std::pair<const void*, int>, int> shared_bytes;  // of (kernel, device), as allowed
  std::map<const void*, int> device_of_memory;              // of cudaMalloc, by its first byte
  std::ostringstream record;                                // a line of JSON for each call
  std::string read;
};
Driver& driver();

extern thread_local cudaError_t last_error;
extern thread_local int device_of_thread;
extern thread_local int streams_of_thread[kDevices];  // the number of each device's current stream
extern thread_local cudaStreamCaptureMode capture_mode;

int shared_per_block(int device);
// Whether it is the current stream of the current device.
bool is_current(cudaStream_t stream);

// Keeps an error for cudaGetLastError.
cudaError_t done(cudaError_t error);
// Refuses a call as the real runtime would, and records it.
cudaError_t refuse(cudaError_t error, const std::string& reason);
// Returns 0, or the error that a test wants of this call.
int planned_failure(const char* call);
// Called at the begin of every call, by a thread that has locked the driver once; returns an error
// if the call is to fail.
cudaError_t begin(const char* call);

}  // namespace emulator::cuda
