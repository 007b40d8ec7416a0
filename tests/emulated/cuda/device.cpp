// A CUDA device for a torch that was built without CUDA: its memory is the host's, its streams are
// those of runtime.h, and torch's own ops run on the CPU. So the extension gets CUDA tensors, a
// current device and a current stream as on a GPU.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "emulated/cuda/runtime.h"
#include "op/launch/launch_parts.h"

namespace {

using namespace emulator::cuda;

c10::Device device_number(int index) {
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)};
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return device_number(current_device()); }
  void setDevice(c10::Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override {
    const c10::Device own = device.has_index() ? device : getDevice();
    return c10::Stream(c10::Stream::UNSAFE, own, current_stream(own.index()));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    set_current_stream(stream.device_index(), static_cast<int>(stream.id()));
    return before;
  }
  void* getStreamNativeHandle(c10::Stream stream) const override {
    return stream_of(stream.device_index(), static_cast<int>(stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};

// The private pool of torch's graph trees: what is allocated while it is open is in it until it is
// freed. Of that, only what a call returns may live on.
struct Pool {
  std::mutex mutex;
  bool open = false;
  std::set<void*> live;
  std::string read;
};
Pool& pool() {
  static auto& one = *new Pool();
  return one;
}

void release(void* data) {
  const std::lock_guard lock(pool().mutex);
  pool().live.erase(data);
  std::free(data);
}

// Uninitialised memory: bytes of ones, NaN in every type.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t whole = (bytes + 511) / 512 * 512;
    void* data = whole == 0 ? nullptr : std::aligned_alloc(512, whole);
    if (data != nullptr) std::memset(data, 0xFF, whole);
    const std::lock_guard lock(pool().mutex);
    if (data != nullptr && pool().open) pool().live.insert(data);
    return {data, data, &release, device_number(current_device())};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Allocator& allocator() {
  static Allocator one;
  return one;
}

at::Device with_index(std::optional<at::Device> device) {
  return device && device->has_index() ? *device : device_number(current_device());
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_generic(size, &allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_strided_generic(size, stride, &allocator(), kKeys,
                                           c10::dtype_or_default(dtype));
}

// The same memory, as a tensor of another device.
at::Tensor moved(const at::Tensor& tensor, at::Device device) {
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .deleter([tensor](void*) {})
      .target_device(device)
      .options(tensor.options().device(device))
      .make_tensor();
}

// Moves a tensor to the CPU; one without elements so that an op may still resize it.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  if (tensor.numel() > 0) return moved(tensor, at::kCPU);
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
}

// Copies the size of a tensor that the op has resized.
void follow(const at::Tensor& tensor, const at::Tensor& resized) {
  if (tensor.sizes() == resized.sizes()) return;
  const at::Tensor now = moved(resized, tensor.device());
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(now.storage());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(now.sizes(), now.strides());
}

// The names of the ops that have run so, each followed by a space.
std::mutex ops_mutex;
std::string ops, read_ops;

// Runs any op of torch on the CPU.
void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  {
    const std::lock_guard lock(ops_mutex);
    ops += op.schema().name() + " ";
  }
  const size_t count = op.schema().arguments().size();
  std::vector<std::pair<at::Tensor, at::Tensor>> known;  // on the CPU, and the op's own
  at::Device device = device_number(current_device());
  const auto to_cpu = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) device = tensor.device();
    known.emplace_back(on_cpu(tensor), tensor);
    return known.back().first;
  };
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors = value.toTensorVector();
      for (at::Tensor& tensor : tensors) tensor = to_cpu(tensor);
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      auto tensors = value.toOptionalTensorList();
      c10::List<std::optional<at::Tensor>> on_host;
      for (size_t j = 0; j < tensors.size(); ++j) {
        const std::optional<at::Tensor> tensor = tensors.get(j);
        on_host.push_back(tensor ? std::optional(to_cpu(*tensor)) : std::nullopt);
      }
      value = on_host;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      device = with_index(value.toDevice());
      value = at::Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [there, own] : known) follow(own, there);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const at::Tensor result = value.toTensor();
    at::Tensor found;
    for (const auto& [there, own] : known)
      if (result.is_same(there)) found = own;
    value = found.defined() ? found : moved(result, device);
  }
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// For tests, by ctypes: `count` arrival counts for one launch on the current stream of a device, or
// null.
extern "C" const void* emulated_cuda_counts(int device, int count) {
  const c10::DeviceGuard guard(device_number(device));
  return lora_ext::kernel_launch::decode_counts(device_number(device), count);
}

// The ops of torch since the last call of this function.
extern "C" const char* emulated_cuda_ops() {
  const std::lock_guard lock(ops_mutex);
  read_ops = std::exchange(ops, "");
  return read_ops.c_str();
}

// From now on memory comes from the pool of a graph, or no longer does.
extern "C" void emulated_cuda_open_pool(int open) {
  const std::lock_guard lock(pool().mutex);
  pool().open = open != 0;
}
// The addresses of what lives in it, each followed by a space.
extern "C" const char* emulated_cuda_pool() {
  const std::lock_guard lock(pool().mutex);
  pool().read.clear();
  for (void* data : pool().live)
    pool().read += std::to_string(reinterpret_cast<uintptr_t>(data)) + " ";
  return pool().read.c_str();
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  // Otherwise torch's fallback for devices without a kernel would look for CUDA's.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
