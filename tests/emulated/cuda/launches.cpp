// Launches, and what "CUDA Runtime API" requires of their configurations.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "emulated/cuda/driver_state.h"
#include "emulator/fault.h"

namespace emulator::cuda {
namespace {

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

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* parameters,
                   const Addresses& addresses, const Enqueue& enqueue) {
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
                  << device_of_thread << R"(, "addresses": )" << addresses.json() << "}\n";
  // Routes are what the host may read.
  if (is_counting() && demangled(parameters).find("ExpertsSort") == std::string::npos)
    return cudaSuccess;
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

using namespace emulator::cuda;

extern "C" cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
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
