#include "op/launch/launch_parts.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <limits>
#include <map>
#include <mutex>

#include "kernels/device.h"
#include "op/launch/kernel_launch.h"

namespace lora_ext::kernel_launch {
namespace {

constexpr int64_t kChunk = 16;  // bytes that are copied at a time

// The matrices or pools with unit stride within a row: the tensors themselves, or copies.
Factors with_rows(at::TensorList factors) {
  Factors out;
  out.reserve(factors.size());
  for (const at::Tensor& factor : factors) {
    out.push_back(factor.stride(-1) == 1 ? factor : factor.contiguous());
  }
  return out;
}

// If ranks is not given, every slot of a pool has the full rank.
at::Tensor ranks_of(const Update& update) {
  const Grouping& many = *update.grouping;
  if (many.ranks) return many.ranks->contiguous();
  return at::full({update.adapters()}, update.rank(), many.scaling.options().dtype(at::kInt));
}

const int32_t* numbers_at(const at::Tensor& numbers) {
  return numbers.defined() ? numbers.const_data_ptr<int32_t>() : nullptr;
}

// 64 KiB for each stream, which a layer of a million columns does not fill; and 1 MiB for graphs,
// of which a launch takes 0.4 KiB for a layer of 4096 columns.
constexpr int64_t kOfStream = 1 << 14, kOfGraphs = 1 << 18, kApart = 32;
constexpr size_t kMaxStreams = 64;

struct OfDevice {
  std::mutex mutex;  // never held while a thread allocates or waits for a stream
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
// begin. What the stream waits for may need another thread's launch, which must not wait for this.
void make_room_for_graphs(OfDevice& mine, const at::Device& device) {
  const auto has_room = [&] { return 2 * mine.taken < kOfGraphs; };
  {
    const std::lock_guard lock(mine.mutex);
    if (has_room()) return;
  }
  at::Tensor room = zeros(device, kOfGraphs);
  wait(device, std::numeric_limits<double>::infinity());
  const std::lock_guard lock(mine.mutex);
  if (has_room()) return;  // another thread has made it meanwhile
  mine.graphs.push_back(std::move(room));
  mine.taken = 0;
}

OfDevice& counts_of(const at::Device& device) {
  static std::mutex mutex;
  // Never destroyed: at the end of a process the device may already have been released.
  static auto& devices = *new std::map<int, OfDevice>();
  const int index = index_of(device);
  const std::lock_guard lock(mutex);
  return devices[index];
}

}  // namespace

int64_t pitch_of(const at::Tensor& tensor) {
  if (tensor.size(0) != 1) return tensor.stride(0);
  const int64_t chunk = kChunk / static_cast<int64_t>(tensor.element_size());
  return (tensor.size(1) + chunk - 1) / chunk * chunk;
}

bool aligned(const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t pitch = pitch_of(tensor);
  return tensor.stride(-1) == 1 && pitch * bytes % kChunk == 0 && pitch >= tensor.size(1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunk == 0;
}

bool aligned_rows(int64_t columns, Dtype dtype) { return columns % chunk_elements(dtype) == 0; }

kernel::Mask mask_of(const DropoutArgs& dropout) {
  kernel::Mask mask{};
  mask.keep_count = philox::kKeepOne, mask.keep_scale = 1.f;
  if (dropout.enabled()) {
    mask = {dropout.seed->const_data_ptr<int64_t>(), dropout.first_row(), dropout.first_col(),
            dropout.keep_count(), static_cast<float>(dropout.keep_scale())};
  }
  return mask;
}

void* stream_of(const at::Device& device) {
  if (!device.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

int index_of(const at::Device& device) {
  if (device.has_index() || !device.is_cuda()) return device.index();
  return c10::impl::VirtualGuardImpl(device.type()).getDevice().index();
}

void check_launch(const std::string& error, const at::Device& device) {
  if (error.empty()) return;
  // cudaErrorMemoryAllocation: a caller may handle it, for example with a smaller batch.
  TORCH_CHECK_WITH(OutOfMemoryError, error.find("out of memory") == std::string::npos,
                   "lora_ext: launching the kernels on ", device, " failed: ", error);
  throw LaunchError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
                    c10::str("lora_ext: launching the kernels on ", device, " failed: ", error));
}

GroupedMatrices::GroupedMatrices(const Update& update, at::TensorList a, at::TensorList b) {
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  const auto pitch = [](const at::Tensor& t) { return t.defined() ? t.stride(-2) : 0; };
  if (update.is_pool()) {
    kernel::LoraGroupedFactors& pool = matrices_.pool;
    pool.a = data(a[0]), pool.b = data(b[0]);
    pool.a_stride = a[0].defined() ? a[0].stride(0) : 0;
    pool.b_stride = b[0].defined() ? b[0].stride(0) : 0;
    pool.a_pitch = pitch(a[0]), pool.b_pitch = pitch(b[0]);
    ranks_ = ranks_of(update);
    pool.ranks = ranks_.const_data_ptr<int32_t>();
    return;
  }
  entries_.reserve(a.size());
  for (size_t g = 0; g < a.size(); ++g) {
    entries_.push_back({data(a[g]), data(b[g]), pitch(a[g]), pitch(b[g]),
                        static_cast<int>(update.lora_a[g].size(0))});
  }
  matrices_.list = entries_.data();
}

GroupedOperands::GroupedOperands(const Update& update)
    : adapters_(update.adapters()),
      rank_(update.rank()),
      scaling_(update.grouping->scaling.contiguous()),
      a_(with_rows(update.lora_a)),
      b_(with_rows(update.lora_b)),
      factors_(update, a_, b_) {
  const Grouping& many = *update.grouping;
  if (many.index) index_ = many.index->reshape({-1}).contiguous();
  if (many.offs) offs_ = many.offs->contiguous();
}

void GroupedOperands::set(kernel::LoraGroupedOperands& operands, int64_t rows) const {
  operands.rows.index = numbers_at(index_), operands.rows.ends = numbers_at(offs_);
  operands.rows.m = static_cast<int>(rows), operands.rows.groups = static_cast<int>(adapters_);
  operands.rows.max_rank = static_cast<int>(rank_);
  operands.scaling = scaling_.const_data_ptr<float>();
  operands.factors = factors_.matrices();
}

uint32_t* decode_counts(const at::Device& device, int64_t count) {
  OfDevice& mine = counts_of(device);
  if (is_capturing(device)) {
    const std::lock_guard lock(mine.mutex);
    return of_a_graph(mine, count);
  }
  make_room_for_graphs(mine, device);
  const std::optional<uint64_t> stream = cuda::stream_id(stream_of(device));
  if (!stream || count > kOfStream) return nullptr;
  {
    const std::lock_guard lock(mine.mutex);
    const auto found = mine.by_stream.find(*stream);
    if (found != mine.by_stream.end()) return data_of(found->second);
    if (mine.by_stream.size() >= kMaxStreams) return nullptr;
  }
  at::Tensor made = zeros(device, kOfStream);
  const std::lock_guard lock(mine.mutex);  // on this stream, another thread may have made them
  return data_of(mine.by_stream.try_emplace(*stream, std::move(made)).first->second);
}

}  // namespace lora_ext::kernel_launch
