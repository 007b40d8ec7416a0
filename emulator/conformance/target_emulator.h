// The machine under the conformance cases: here the execution layer. target_cuda.h has the same
// names for a GPU.
#pragma once

#include "emulator/conformance/vectors.h"
#include "emulator/emulator.h"

namespace conformance {

// An array in the machine's global memory.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : buffer_(values, "array") {}
  explicit DeviceArray(size_t zeros) : DeviceArray(std::vector<T>(zeros)) {}
  T* data() { return buffer_.data(); }
  std::vector<T> to_host() const { return buffer_.to_vector(); }

 private:
  emulator::GlobalBuffer<T> buffer_;
};

struct Launch {
  uint32_t blocks, threads;
  uint32_t shared_bytes = 0;
  uint32_t cluster = 1;
  bool programmatic_dependent = false;  // on the launch before it
};

inline emulator::Stream& stream() {
  static emulator::Stream the_stream;
  return the_stream;
}

template <typename... Parameters, typename... Arguments>
void launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (skipping) return;
  emulator::LaunchConfig config;
  config.grid = dim3(launch.blocks, 1, 1);
  config.block = dim3(launch.threads, 1, 1);
  config.cluster = dim3(launch.cluster, 1, 1);
  config.shared_bytes = launch.shared_bytes;
  config.programmatic_dependent = launch.programmatic_dependent;
  stream().launch(config, kernel, std::forward<Arguments>(arguments)...);
}

// Waits for everything launched.
inline void synchronize() { stream().synchronize(); }

inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                  void* base, const cuuint64_t* dims, const cuuint64_t* pitches,
                                  const cuuint32_t* box, const cuuint32_t* strides,
                                  CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return emulator::encode_tensor_map_tiled(map, type, rank, base, dims, pitches, box, strides,
                                           interleave, swizzle, promotion, fill);
}

// The seed selects the schedule, on which no output may depend.
inline void prepare(uint64_t seed) {
  emulator::config() = emulator::Config{};
  emulator::config().seed = seed;
  emulator::config().completion = static_cast<emulator::Completion>(seed % 3);
  emulator::config().schedule = static_cast<emulator::Schedule>(seed / 3 % 3);
}

inline std::string producer() {
  return "{\"kind\": \"emulator\", \"name\": \"execution layer\", \"compute_capability\": 90}";
}

}  // namespace conformance
