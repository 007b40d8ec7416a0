// Functions of cuda_runtime_api.h. They check what "CUDA Runtime API" and "CUDA Driver API" require.
#include <cstdlib>
#include <cstring>

#include "emulated/cuda/driver_state.h"

namespace emulator::cuda {
namespace {

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

}  // namespace emulator::cuda

using namespace emulator::cuda;

namespace {

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
                  << bytes << R"(, "address": )" << reinterpret_cast<uintptr_t>(data) << "}\n";
  if (!is_counting()) std::memset(data, value, bytes);
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
