// A CUDA device for a torch that was built without CUDA: its memory is the host's, its streams are
// those of runtime.h, and torch's own ops run on the CPU. So the extension gets CUDA tensors, a
// current device and a current stream as on a GPU. Where calls are counted (counting.h) torch's ops
// run on meta.
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <ATen/record_function.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#include "emulated/cuda/driver_state.h"
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
  if (!is_counted(data)) std::free(data);
}

// Uninitialised memory: bytes of ones, NaN in every type.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (is_counting() && bytes > 0) {
      void* data = take_counted(bytes);
      return {data, data, &release, device_number(current_device())};
    }
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
template <class ToDevice>
void follow(const at::Tensor& tensor, const at::Tensor& resized, const ToDevice& to_device) {
  if (tensor.sizes() == resized.sizes()) return;
  const at::Tensor now = to_device(resized);
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(now.storage());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(now.sizes(), now.strides());
}

// The names of the ops that have run so, each followed by a space.
std::mutex ops_mutex;
std::string ops, read_ops;

// Distinct elements, in bytes: where a stride is 0, one is read many times.
int64_t bytes_of(const at::Tensor& tensor) {
  int64_t count = static_cast<int64_t>(tensor.element_size());
  for (int64_t i = 0; i < tensor.dim(); ++i)
    count *= tensor.stride(i) == 0 && tensor.size(i) > 0 ? 1 : tensor.size(i);
  return count;
}

// Of each tensor of the device its address, its bytes, and its sizes.
std::string json(const std::vector<at::Tensor>& tensors) {
  std::ostringstream text;
  const char* before = "";
  text << "[";
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined() || !tensor.is_cuda() || tensor.numel() == 0) continue;
    text << before << "[" << reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) << ", "
         << bytes_of(tensor) << ", " << tensor.sizes() << "]";
    before = ", ";
  }
  text << "]";
  return text.str();
}

// Whether the host waits for what an op has found, or copies between host and device.
bool reads_host(const std::string& name, const std::vector<at::Tensor>& given) {
  static const std::set<std::string> waiting = {"aten::_local_scalar_dense",
                                                "aten::_unique2",
                                                "aten::bincount",
                                                "aten::equal",
                                                "aten::masked_select",
                                                "aten::nonzero",
                                                "aten::repeat_interleave",
                                                "aten::unique_consecutive",
                                                "aten::unique_dim"};
  if (waiting.contains(name)) return true;
  if (name == "aten::copy_") return given[0].is_cuda() != given[1].is_cuda();
  if (name != "aten::_index_put_impl_") return false;  // of others' masks the numbers are asked for
  return std::any_of(given.begin() + 1, given.end(), [](const at::Tensor& each) {
    return each.scalar_type() == at::kBool || each.scalar_type() == at::kByte;
  });
}

// Whether an op that is counted runs all the same: it has integers alone, or tells the host.
bool runs_counted(bool host, const std::string& name, const std::vector<at::Tensor>& given) {
  if (name == "aten::copy_" && !given[0].is_cuda()) return true;
  if (host && name != "aten::copy_") return true;
  return std::all_of(given.begin(), given.end(), [](const at::Tensor& each) {
    return at::isIntegralType(each.scalar_type(), true);
  });
}

// Runs any op of torch on the CPU, or on meta.
void run_op(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  {
    const std::lock_guard lock(ops_mutex);
    ops += name + " ";
  }
  const size_t count = op.schema().arguments().size();
  const auto each_given = [&](const auto& change) {
    for (size_t i = stack->size() - count; i < stack->size(); ++i) {
      c10::IValue& value = (*stack)[i];
      if (value.isTensor()) {
        value = change(value.toTensor());
      } else if (value.isTensorList()) {
        std::vector<at::Tensor> tensors = value.toTensorVector();
        for (at::Tensor& tensor : tensors) tensor = change(tensor);
        value = tensors;
      } else if (value.isOptionalTensorList()) {
        auto tensors = value.toOptionalTensorList();
        c10::List<std::optional<at::Tensor>> changed;
        for (size_t j = 0; j < tensors.size(); ++j) {
          const std::optional<at::Tensor> tensor = tensors.get(j);
          changed.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
        }
        value = changed;
      }
    }
  };
  std::vector<at::Tensor> given;
  each_given([&](const at::Tensor& tensor) {
    if (tensor.defined()) given.push_back(tensor);
    return tensor;
  });
  const bool host = is_counting() && reads_host(name, given);
  const bool on_meta = is_counting() && !runs_counted(host, name, given);
  const at::Device elsewhere = on_meta ? at::kMeta : at::kCPU;
  const auto there = [&](const at::Tensor& tensor) {
    if (!on_meta) return on_cpu(tensor);
    if (!tensor.is_cuda() && tensor.dim() == 0) return tensor;  // a number
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
  };
  std::vector<std::pair<at::Tensor, at::Tensor>> known;  // elsewhere, and the op's own
  at::Device device = device_number(current_device());
  each_given([&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) device = tensor.device();
    known.emplace_back(there(tensor), tensor);
    return known.back().first;
  });
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (!value.isDevice() || !value.toDevice().is_cuda()) continue;
    device = with_index(value.toDevice());
    value = elsewhere;
  }
  op.redispatchBoxed(c10::DispatchKeySet(on_meta ? c10::DispatchKey::Meta : c10::DispatchKey::CPU),
                     stack);
  const auto to_device = [&](const at::Tensor& result) {
    if (!on_meta) return moved(result, device);
    return at::empty_strided(result.sizes(), result.strides(), result.options().device(device));
  };
  for (const auto& [now, own] : known) follow(own, now, to_device);
  std::vector<at::Tensor> results;
  const auto back = [&](const at::Tensor& result) {
    if (!result.defined()) return result;
    at::Tensor found;
    for (const auto& [now, own] : known)
      if (result.is_same(now)) found = own;
    results.push_back(found.defined() ? found : to_device(result));
    return results.back();
  };
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors = value.toTensorVector();
      for (at::Tensor& tensor : tensors) tensor = back(tensor);
      value = tensors;
    }
  }
  if (!is_counting()) return;
  const std::lock_guard lock(driver().mutex);
  driver().record << R"({"call": "library", "op": ")" << name << R"(", "given": )" << json(given)
                  << R"(, "results": )" << json(results) << R"(, "host": )"
                  << (host ? "true" : "false") << "}\n";
}

// Before what an op of this package launches, the record has the op's operands.
std::unique_ptr<at::ObserverContext> record_operands(const at::RecordFunction& call) {
  if (!is_counting() || std::string(call.name()).rfind("lora_ext::", 0) != 0) return nullptr;
  std::vector<at::Tensor> operands;
  for (const c10::IValue& value : call.inputs()) {
    if (value.isTensor()) operands.push_back(value.toTensor());
    if (!value.isTensorList()) continue;
    for (const at::Tensor& tensor : value.toTensorVector()) operands.push_back(tensor);
  }
  const std::lock_guard lock(driver().mutex);
  driver().record << R"({"call": "op", "op": ")" << call.name() << R"(", "operands": )"
                  << json(operands) << "}\n";
  return nullptr;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// What autograd asks of a device with streams. A torch without CUDA knows none: where this library
// is loaded before torch, these answer.
namespace at {

// Found by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return is_counting(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace accelerator {

std::optional<c10::DeviceType> getAccelerator(bool checked) {
  TORCH_CHECK(is_counting() || !checked, "expected calls that are counted");
  return is_counting() ? std::optional(c10::DeviceType::CUDA) : std::nullopt;
}
c10::Stream getCurrentStream(c10::DeviceIndex index) {
  return Guard().getStream(device_number(index));
}

}  // namespace accelerator
}  // namespace at

// For tests, by ctypes.

// `count` arrival counts for one launch on the current stream of a device, or null.
extern "C" const void* emulated_cuda_counts(int device, int count) {
  const c10::DeviceGuard guard(device_number(device));
  return lora_ext::kernel_launch::decode_counts(device_number(device), count);
}

// From now on calls are counted, or run.
extern "C" void emulated_cuda_count_only(int on) {
  static const auto callback = at::addGlobalCallback(at::RecordFunctionCallback(&record_operands)
                                                         .needsInputs(true)
                                                         .scopes({at::RecordScope::FUNCTION}));
  (void)callback;
  set_counting(on != 0);
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
  // Otherwise torch would look for CUDA's kernel, loop over groups, or take other ops together.
  for (const char* op : {"copy_", "_grouped_mm", "silu_backward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&run_op>());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_op>()); }
