// See runtime.h. It checks what "CUDA Runtime API" and "CUDA Driver API" require.
#include "emulated/cuda/runtime.h"

#include <cxxabi.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "emulated/mutants/known_fault.h"
#include "emulator/fault.h"

namespace emulator::cuda {
namespace {

constexpr int kSms = 8;

// What a device is. Clusters of two that are resident at a time may be fewer than its SMs have room
// for.
struct Card {
  int arch = 90, sms = kSms, clusters = kSms / 2;
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

// Refuses a call as the real runtime would, and records it.
cudaError_t refuse(cudaError_t error, const std::string& reason) {
  driver().record << R"({"refused": ")" << reason << "\"}\n";
  return done(error);
}

// Returns 0, or the error that a test wants of this call.
int planned_failure(const char* call) {
  auto& failing = driver().failing;
  const auto found = failing.find(call);
  if (found == failing.end() || --found->second.first > 0) return 0;
  const int error = found->second.second;
  failing.erase(found);
  return error;
}

// Called at the begin of every call, by a thread that has locked the driver once; returns an error
// if the call is to fail.
cudaError_t begin(const char* call) {
  while (driver().loads == call && driver().busy == device_of_thread) {
    ++driver().waiting;
    driver().idle.wait(driver().mutex);
  }
  if (driver().version < CUDART_VERSION / 1000 * 1000)
    return done(driver().version == 0 ? cudaErrorNoDevice : cudaErrorInsufficientDriver);
  return done(static_cast<cudaError_t>(planned_failure(call)));
}

std::string demangled(const char* name) {
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, nullptr), std::free);
  return text == nullptr ? name : text.get();
}

std::string json(const dim3& size) {
  std::ostringstream text;
  text << "[" << size.x << ", " << size.y << ", " << size.z << "]";
  return text.str();
}

struct Attributes {
  dim3 cluster = dim3(1, 1, 1);
  bool programmatic = false;
};

// Returns "" or the error.
std::string read_attributes(const cudaLaunchConfig_t& config, Attributes& out) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      out.cluster = dim3(cluster.x, cluster.y, cluster.z);
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      out.programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else {
      return "an attribute that this runtime does not know";
    }
  }
  return "";
}

std::string why_invalid(const cudaLaunchConfig_t& config, const Attributes& attributes,
                        const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim, &cluster = attributes.cluster;
  const unsigned threads = block.x * block.y * block.z;
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  if (threads == 0 || threads > 1024) return "threads of a block are not in 1..1024";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "an empty grid";
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return "a grid above the limit";
  if (blocks == 0 || blocks > 8) return "a cluster is not of 1..8 blocks";
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return "the grid is not of whole clusters";
  const auto allowed = driver().shared_bytes.find({kernel, device_of_thread});
  const size_t most = allowed == driver().shared_bytes.end() ? 48 * 1024 : allowed->second;
  if (config.dynamicSmemBytes > most)
    return "more dynamic shared memory than this kernel is allowed on this device";
  return "";
}

}  // namespace

int current_device() { return device_of_thread; }
void set_current_device(int device) { device_of_thread = device; }
int current_stream(int device) { return streams_of_thread[device]; }
void set_current_stream(int device, int number) { streams_of_thread[device] = number; }
cudaStream_t stream_of(int device, int number) {
  return reinterpret_cast<cudaStream_t>(uintptr_t{16} * (number * kDevices + device + 1));
}

namespace {
// Whether it is the current stream of the current device.
bool is_current(cudaStream_t stream) {
  return stream == stream_of(device_of_thread, current_stream(device_of_thread));
}

CUresult driver_version(int* version) {
  *version = driver().version;
  return CUDA_SUCCESS;
}
}  // namespace

void* open_driver(const char* name, int) {
  return std::strcmp(name, "libcuda.so.1") == 0 && driver().version > 0 ? &driver() : nullptr;
}
void* find_in_driver(void* opened, const char* function) {
  if (opened != &driver() || std::strcmp(function, "cuDriverGetVersion") != 0) return nullptr;
  return reinterpret_cast<void*>(&driver_version);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* parameters,
                   const Enqueue& enqueue) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaLaunchKernelEx"); error != cudaSuccess) return error;
  Attributes attributes;
  std::string wrong = read_attributes(config, attributes);
  if (wrong.empty()) wrong = why_invalid(config, attributes, kernel);
  if (!wrong.empty()) return refuse(cudaErrorInvalidConfiguration, wrong);
  if (!is_current(config.stream))
    return refuse(cudaErrorInvalidResourceHandle, "a stream that is not the current one");
  driver().record << R"({"call": "cudaLaunchKernelEx", "parameters": ")" << demangled(parameters)
                  << R"(", "grid": )" << json(config.gridDim) << R"(, "cluster": )"
                  << json(attributes.cluster) << R"(, "threads": )" << config.blockDim.x
                  << R"(, "shared": )" << config.dynamicSmemBytes << R"(, "programmatic": )"
                  << (attributes.programmatic ? "true" : "false") << R"(, "device": )"
                  << device_of_thread << "}\n";
  emulator::Config& layer = emulator::config();
  layer.schedule = Schedule::RunAhead, layer.completion = Completion::Late;
  layer.resident_clusters = 8;
  try {
    Stream stream;
    enqueue(stream, {.grid = config.gridDim,
                     .block = config.blockDim,
                     .cluster = attributes.cluster,
                     .shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes)});
    stream.synchronize();
  } catch (const Error& error) {
    return refuse(cudaErrorLaunchFailure, name_of(error.kind));
  }
  return cudaSuccess;
}

}  // namespace emulator::cuda

namespace {

using namespace emulator::cuda;

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* dimensions, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                CUtensorMapFloatOOBfill fill) {
  const std::lock_guard lock(driver().mutex);
  if (const int error = planned_failure("cuTensorMapEncodeTiled")) {
    return static_cast<CUresult>(error);
  }
  const CUresult result =
      emulator::encode_tensor_map_tiled(map, type, rank, data, dimensions, strides, box,
                                        element_strides, interleave, swizzle, promotion, fill);
  if (result != CUDA_SUCCESS) {
    driver().record << R"({"refused": ")" << emulator::tensor_map_error() << "\"}\n";
    return result;
  }
  driver().record << R"({"call": "cuTensorMapEncodeTiled", "data": )"
                  << reinterpret_cast<uintptr_t>(data) << R"(, "columns": )" << dimensions[0]
                  << R"(, "rows": )" << dimensions[1] << R"(, "stride": )" << strides[0]
                  << R"(, "box": [)" << box[0] << ", " << box[1] << "]}\n";
  return result;
}

}  // namespace

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
// The nth call from now of a function fails with an error.
void emulated_cuda_plant(const char* mutant) { emulated::plant_known_fault(mutant); }

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

// The runtime.

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "another error";
  }
}

cudaError_t cudaDriverGetVersion(int*) {
  return refuse(cudaErrorNotPermitted, "a question that initialises the driver");
}

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaGetDevice"); error != cudaSuccess) return error;
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaGetDeviceProperties"); error != cudaSuccess)
    return error;
  if (device < 0 || device >= kDevices) return done(cudaErrorInvalidDevice);
  std::memset(static_cast<void*>(properties), 0, sizeof *properties);
  const Card& card = driver().cards[device];
  const std::string name = "emulated sm_" + std::to_string(card.arch);
  name.copy(properties->name, sizeof properties->name - 1);
  properties->major = card.arch / 10, properties->minor = card.arch % 10;
  properties->multiProcessorCount = card.sms;
  properties->sharedMemPerBlockOptin = shared_per_block(device);
  properties->sharedMemPerMultiprocessor = shared_per_block(device) + 1024;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaStreamIsCapturing"); error != cudaSuccess) return error;
  (void)stream;
  *status = driver().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaStreamGetId"); error != cudaSuccess) return error;
  if (driver().capturing) return refuse(cudaErrorStreamCaptureUnsupported, "an id in a capture");
  *id = 1 + reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

// A launch returns when its kernel has ended, so every event is done once it is recorded, unless a
// test says otherwise.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  static char one;
  *event = reinterpret_cast<cudaEvent_t>(&one);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
// Another thread may be capturing, in the global mode.
cudaError_t cudaEventQuery(cudaEvent_t) {
  const std::lock_guard lock(driver().mutex);
  if (capture_mode != cudaStreamCaptureModeRelaxed)
    return refuse(cudaErrorStreamCaptureUnsupported, "a query that ends another thread's capture");
  if (driver().busy != current_device()) return cudaSuccess;
  ++driver().waiting;
  return done(cudaErrorNotReady);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// Uninitialised memory, as device.cpp's. Another thread may be capturing, in the global mode.
cudaError_t cudaMalloc(void** data, size_t bytes) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaMalloc"); error != cudaSuccess) return error;
  if (driver().capturing || capture_mode != cudaStreamCaptureModeRelaxed)
    return refuse(cudaErrorStreamCaptureUnsupported, "an allocation that ends a capture");
  *data = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(*data, 0xFF, bytes);
  driver().device_of_memory[*data] = current_device();
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  const std::lock_guard lock(driver().mutex);
  driver().device_of_memory.erase(data);
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaFuncSetAttribute"); error != cudaSuccess) return error;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return refuse(cudaErrorInvalidValue, "an attribute that this runtime does not know");
  if (value < 0 || value > shared_per_block(current_device()))
    return refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
  driver().shared_bytes[{kernel, current_device()}] = value;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaMemsetAsync"); error != cudaSuccess) return error;
  if (!is_current(stream))
    return refuse(cudaErrorInvalidResourceHandle, "a stream that is not the current one");
  if (capture_mode != cudaStreamCaptureModeGlobal)
    return refuse(cudaErrorInvalidValue, "a capture mode that was not put back");
  driver().record << R"({"call": "cudaMemsetAsync", "value": )" << value << R"(, "bytes": )"
                  << bytes << "}\n";
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const std::lock_guard lock(driver().mutex);
  if (const cudaError_t error = begin("cudaOccupancyMaxActiveClusters"); error != cudaSuccess)
    return error;
  Attributes attributes;
  std::string wrong = read_attributes(*config, attributes);
  if (wrong.empty()) wrong = why_invalid(*config, attributes, kernel);
  if (!wrong.empty()) return refuse(cudaErrorInvalidConfiguration, wrong);
  const dim3& cluster = attributes.cluster;
  const Card& card = driver().cards[current_device()];
  *clusters =
      std::min(card.clusters, card.sms / static_cast<int>(cluster.x * cluster.y * cluster.z));
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result) {
  const std::lock_guard lock(driver().mutex);
  const cudaError_t error = begin("cudaGetDriverEntryPointByVersion");
  if (error != cudaSuccess) return error;
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return flags == cudaEnableDefault ? cudaSuccess : done(cudaErrorInvalidValue);
}

}  // extern "C"
