#include <cuda_runtime.h>
#include <dlfcn.h>

#include <chrono>
#include <functional>
#include <thread>
#include <unordered_map>

#include "kernels/device.h"
#include "kernels/launch/driver.h"

namespace lora_ext::cuda {
namespace {

// 12080 -> "12.8"
std::string text_of_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Returns 0 without a driver. Asks the driver itself, since cudaDriverGetVersion may initialise it,
// after which CUDA cannot be used in a process that is forked: `import lora_ext` may ask.
int driver_version() {
  int version = 0;
  void* library = dlopen("libcuda.so.1", RTLD_NOW);  // kept open: the runtime uses it, too
  if (library == nullptr) return 0;
  const auto get =
      reinterpret_cast<decltype(&cuDriverGetVersion)>(dlsym(library, "cuDriverGetVersion"));
  return get != nullptr && get(&version) == CUDA_SUCCESS ? version : 0;
}

std::string too_old(int version) {
  const std::string built = text_of_version(CUDART_VERSION);
  return "older than CUDA " + built +
         ", which the kernels were built with: update the driver, or " +
         "reinstall lora_ext with a toolkit of " + text_of_version(version) + " or older";
}

// Defined by setup.py; without it, kernels with wgmma are empty on every card.
#ifdef LORA_EXT_WITH_SM90A
constexpr bool kHasSm90aCode = true;
#else
constexpr bool kHasSm90aCode = false;
#endif

// A query would invalidate a capture that another thread has begun in the global mode, which is
// torch's default, although it has nothing to do with this stream.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the previous mode
};

using Encode = decltype(&cuTensorMapEncodeTiled);

// The oldest version of the function, from CUDA 12.0; null if the driver does not have it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  const bool usable = text_of(error).empty() && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(function) : nullptr;
}

Encode encode_function() {
  static const Encode found = find_encode();
  return found;
}

cudaError_t encode(const TensorMapKey& key, CUtensorMap* map) {
  const Encode encode_tiled = encode_function();
  if (encode_tiled == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(key.columns),
                                   static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(key.pitch * key.element_bytes)};
  const cuuint32_t box[] = {128u / static_cast<cuuint32_t>(key.element_bytes),
                            static_cast<cuuint32_t>(key.box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUresult result =
      encode_tiled(map, key.type, 2, const_cast<void*>(key.data), dimensions, strides, box,
                   element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Hash {
  size_t operator()(const TensorMapKey& key) const {
    size_t hash = std::hash<const void*>()(key.data);
    for (const int64_t part : {int64_t{key.rows}, int64_t{key.columns}, key.pitch,
                               int64_t{key.box_rows}, int64_t{key.type}})
      hash = hash * 0x9E3779B97F4A7C15ull + std::hash<int64_t>()(part);
    return hash;
  }
};

}  // namespace

std::string text_of(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const std::string text = cudaGetErrorString(error);
  const int version = driver_version();
  if (version == 0 || version >= CUDART_VERSION) return text;
  return text + " (the driver takes CUDA " + text_of_version(version) + ", " + too_old(version) +
         ")";
}

std::string driver() {
  const int version = driver_version();
  if (version == 0) return "none";
  if (version >= CUDART_VERSION) return text_of_version(version);
  return text_of_version(version) + ", " + too_old(version);
}

bool is_built() { return true; }
bool has_kernels(bool is_cuda) { return is_cuda; }

plan::Card card_of(int device) {
  plan::Card card{};
  cudaDeviceProp properties{};
  card.error = text_of(cudaGetDeviceProperties(&properties, device));
  if (!card.error.empty()) return card;
  card.arch = 10 * properties.major + properties.minor;
  card.sms = properties.multiProcessorCount;
  card.shared_per_sm = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  card.shared_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  card.name = properties.name;
  card.tensor_maps = has_tensor_maps();
  card.sm90a_code = kHasSm90aCode;
  return card;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return !text_of(error).empty() || status != cudaStreamCaptureStatusNone;
}

std::optional<uint64_t> stream_id(void* stream) {
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetId(static_cast<cudaStream_t>(stream), &id);
  return text_of(error).empty() ? std::optional<uint64_t>(id) : std::nullopt;
}

uint32_t* permanent_zeros(int64_t count, void* stream) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(uint32_t);
  void* made = nullptr;
  {
    const BesideCaptures beside;
    if (!text_of(cudaMalloc(&made, bytes)).empty()) return nullptr;
  }
  if (text_of(cudaMemsetAsync(made, 0, bytes, static_cast<cudaStream_t>(stream))).empty())
    return static_cast<uint32_t*>(made);
  const BesideCaptures beside;
  cudaFree(made);
  return nullptr;
}

// Polls, since a wait in the driver cannot be aborted.
std::optional<std::string> wait(void* stream, double seconds) {
  using Clock = std::chrono::steady_clock;
  const BesideCaptures beside;
  cudaEvent_t done = nullptr;
  cudaError_t error = cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  if (error != cudaSuccess) return text_of(error);
  error = cudaEventRecord(done, static_cast<cudaStream_t>(stream));
  const Clock::time_point start = Clock::now();
  bool ended = true;
  while (error == cudaSuccess) {
    error = cudaEventQuery(done);
    if (error != cudaErrorNotReady) break;
    cudaGetLastError();  // clears "not ready", which is no error
    error = cudaSuccess;
    if (std::chrono::duration<double>(Clock::now() - start).count() > seconds) {
      ended = false;
      break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  const std::string text = text_of(error);
  cudaEventDestroy(done);
  if (!ended) return std::nullopt;
  return text;
}

bool has_tensor_maps() { return encode_function() != nullptr; }

cudaError_t tensor_map(const TensorMapKey& key, CUtensorMap* map) {
  constexpr size_t kMax = 4096;  // 700 KiB; a limit, since activations keep getting new addresses
  thread_local std::unordered_map<TensorMapKey, CUtensorMap, Hash> kept;
  if (const auto known = kept.find(key); known != kept.end()) {
    *map = known->second;
    return cudaSuccess;
  }
  const cudaError_t error = encode(key, map);
  if (error != cudaSuccess) return error;
  if (kept.size() == kMax) kept.clear();
  kept.emplace(key, *map);
  return cudaSuccess;
}

}  // namespace lora_ext::cuda
