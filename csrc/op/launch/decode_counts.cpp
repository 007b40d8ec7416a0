#include "op/launch/decode_counts.h"

#include <ATen/ops/empty.h>

#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "kernels/device.h"
#include "op/launch/kernel_launch.h"
#include "op/launch/launch_parts.h"

namespace lora_ext::kernel_launch {
namespace {

// 64 KiB for each stream, which a layer of a million columns does not fill; and 1 MiB for graphs,
// of which a launch takes 0.4 KiB for a layer of 4096 columns.
constexpr int64_t kOfStream = 1 << 14, kOfGraphs = 1 << 18, kApart = 32;
constexpr size_t kMostStreams = 64;

struct OfDevice {
  std::map<uint64_t, at::Tensor> by_stream;
  std::vector<at::Tensor> graphs;  // the last one has room
  int64_t taken = kOfGraphs;
};

at::Tensor zeros(const at::Device& device, int64_t count) {
  const at::Tensor made = at::empty({count}, at::TensorOptions().device(device).dtype(at::kInt));
  check_launch(cuda::clear(made.mutable_data_ptr<int32_t>(), count, stream_of(device)), device);
  return made;
}

uint32_t* data_of(const at::Tensor& counts) {
  return reinterpret_cast<uint32_t*>(counts.mutable_data_ptr<int32_t>());
}

uint32_t* of_a_graph(OfDevice& mine, int64_t count) {
  const int64_t apart = (count + kApart - 1) / kApart * kApart;
  if (mine.taken + apart > kOfGraphs) return nullptr;
  uint32_t* found = data_of(mine.graphs.back()) + mine.taken;
  mine.taken += apart;
  return found;
}

// Called while no graph is captured: what is allocated during a capture belongs to one graph only.
// A replay may run on any stream, so this waits until the counters are zero before a capture can
// begin.
void make_room_for_graphs(OfDevice& mine, const at::Device& device) {
  if (2 * mine.taken < kOfGraphs) return;
  mine.graphs.push_back(zeros(device, kOfGraphs));
  mine.taken = 0;
  wait(device, std::numeric_limits<double>::infinity());
}

}  // namespace

uint32_t* decode_counts(const at::Device& device, int64_t count) {
  static std::mutex mutex;
  // Never destroyed: at the end of a process the device may already have been released.
  static auto& devices = *new std::map<int, OfDevice>();
  const std::lock_guard lock(mutex);
  OfDevice& mine = devices[index_of(device)];
  if (is_capturing(device)) return of_a_graph(mine, count);
  make_room_for_graphs(mine, device);
  const std::optional<uint64_t> stream = cuda::stream_id(stream_of(device));
  if (!stream || count > kOfStream) return nullptr;
  auto found = mine.by_stream.find(*stream);
  if (found == mine.by_stream.end()) {
    if (mine.by_stream.size() >= kMostStreams) return nullptr;
    found = mine.by_stream.emplace(*stream, zeros(device, kOfStream)).first;
  }
  return data_of(found->second);
}

}  // namespace lora_ext::kernel_launch
