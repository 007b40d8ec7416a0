#include "op/launch/launch_parts.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <limits>
#include <map>
#include <mutex>

#include "kernels/device.h"
#include "op/launch/kernel_launch.h"

namespace lora_ext::kernel_launch {
namespace {

constexpr int64_t kChunk = 16;  // bytes that are copied at a time

// The matrices or pools with unit stride within a row, and those of experts with rows in whole
// chunks: the tensors themselves, or copies.
Factors with_rows(at::TensorList factors, bool in_chunks) {
  Factors out;
  out.reserve(factors.size());
  for (const at::Tensor& factor : factors) {
    out.push_back(factor.stride(-1) == 1 ? factor : factor.contiguous());
    const int64_t chunk = kChunk / static_cast<int64_t>(factor.element_size());
    const int64_t columns = factor.size(-1), more = (chunk - columns % chunk) % chunk;
    if (in_chunks && more != 0)
      out.back() = at::constant_pad_nd(factor, {0, more}).narrow(-1, 0, columns);
  }
  return out;
}

const int32_t* numbers_at(const at::Tensor& numbers) {
  return numbers.defined() ? numbers.const_data_ptr<int32_t>() : nullptr;
}

// 64 KiB for each stream, which a layer of a million columns does not fill; and 1 MiB for graphs,
// of which a launch takes 0.4 KiB for a layer of 4096 columns.
constexpr int64_t kOfStream = 1 << 14, kOfGraphs = 1 << 18, kApart = 32;
constexpr size_t kMaxStreams = 64;

// Never of torch's allocator: torch.compile's graphs run the first calls of a function, too, with
// all that it allocates in a pool of their own, in which nothing but results may live on.
struct OfDevice {
  std::mutex mutex;  // never held while a thread allocates or waits for a stream
  std::map<uint64_t, uint32_t*> by_stream;
  uint32_t* graphs = nullptr;  // the last room; those before belong to their graphs
  int64_t taken = kOfGraphs;   // of it
  bool refused = false;        // there was no memory, which is not asked for in each call
};

uint32_t* make_zeros(OfDevice& mine, const at::Device& device, int64_t count) {
  {
    const std::lock_guard lock(mine.mutex);
    if (mine.refused) return nullptr;
  }
  uint32_t* made = cuda::permanent_zeros(count, stream_of(device));
  const std::lock_guard lock(mine.mutex);
  mine.refused = made == nullptr;
  return made;
}

uint32_t* of_a_graph(OfDevice& mine, int64_t count) {
  const int64_t apart = (count + kApart - 1) / kApart * kApart;
  if (mine.taken + apart > kOfGraphs) return nullptr;
  uint32_t* found = mine.graphs + mine.taken;
  mine.taken += apart;
  return found;
}

// Called while no graph is captured on the stream, which allows no wait. A replay may run on any
// stream, so this waits until the counters are zero before a capture can begin. What the stream
// waits for may need another thread's launch, which must not wait for this.
void make_room_for_graphs(OfDevice& mine, const at::Device& device) {
  const auto has_room = [&] { return 2 * mine.taken < kOfGraphs; };
  {
    const std::lock_guard lock(mine.mutex);
    if (has_room()) return;
  }
  uint32_t* room = make_zeros(mine, device, kOfGraphs);
  if (room == nullptr) return;
  wait(device, std::numeric_limits<double>::infinity());
  const std::lock_guard lock(mine.mutex);
  if (has_room()) return;  // another thread has made it meanwhile; these are left
  mine.graphs = room, mine.taken = 0;
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

at::Tensor first_matrix(const at::Tensor& stack) {
  const at::Tensor first = stack.select(0, 0);
  return first.stride(1) == 1 ? first : first.t();
}

bool aligned_stack(const at::Tensor& stack) {
  const at::Tensor first = first_matrix(stack);
  const int64_t pitch = std::max<int64_t>(1, pitch_of(first));
  return aligned(first) && stack.stride(0) % pitch == 0 &&
         stack.stride(0) / pitch * stack.size(0) <= std::numeric_limits<int>::max();
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
    const Grouping& many = *update.grouping;
    if (many.ranks) ranks_ = many.ranks->contiguous();
    pool.ranks = numbers_at(ranks_);
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
      one_scaling_(static_cast<float>(update.scaling)),
      a_(with_rows(update.lora_a, update.experts() != nullptr)),
      b_(with_rows(update.lora_b, update.experts() != nullptr)),
      factors_(update, a_, b_) {
  const Grouping& many = *update.grouping;
  if (many.scaling.defined()) scaling_ = many.scaling.contiguous();
  if (many.index) index_ = many.index->reshape({-1}).contiguous();
  if (many.offs) offs_ = many.offs->contiguous();
}

void GroupedOperands::set(kernel::LoraGroupedOperands& operands, int64_t rows) const {
  operands.rows.index = numbers_at(index_), operands.rows.ends = numbers_at(offs_);
  operands.rows.m = static_cast<int>(rows), operands.rows.groups = static_cast<int>(adapters_);
  operands.rows.max_rank = static_cast<int>(rank_);
  operands.scaling = scaling_.defined() ? scaling_.const_data_ptr<float>() : nullptr;
  operands.one_scaling = one_scaling_;
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
    if (found != mine.by_stream.end()) return found->second;
    if (mine.by_stream.size() >= kMaxStreams) return nullptr;
  }
  uint32_t* made = make_zeros(mine, device, kOfStream);
  if (made == nullptr) return nullptr;
  const std::lock_guard lock(mine.mutex);  // on this stream, another thread may have made them
  return mine.by_stream.try_emplace(*stream, made).first->second;
}

}  // namespace lora_ext::kernel_launch
