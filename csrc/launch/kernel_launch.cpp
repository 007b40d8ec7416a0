#ifdef LORA_EXT_WITH_CUDA
#include "launch/kernel_launch.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <unordered_map>

#include "common/check.h"
#include "cuda/lora_linear.h"
#include "library/base_linear.h"

namespace lora_ext::kernel_launch {
namespace {

// Of one row, a tensor may have any stride; this is one of whole chunks.
int64_t pitch_of(const at::Tensor& tensor) {
  return tensor.size(0) == 1 ? (tensor.size(1) + 7) / 8 * 8 : tensor.stride(0);
}

// A tensor's rows can be copied in 16-byte chunks, and by a tensor map, which has no place for rows
// that overlap.
bool aligned(const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t pitch = pitch_of(tensor);
  return tensor.stride(-1) == 1 && pitch * bytes % 16 == 0 && pitch >= tensor.size(1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Of a result [rows, columns] that torch's allocator aligns.
bool aligned_rows(int64_t columns) { return columns % 8 == 0; }

template <class Args>
plan::Problem common_problem(const Args& args) {
  plan::Problem problem{};
  const Update& update = args.update;
  problem.m = args.x.size(0), problem.n = update.out_features(), problem.k = args.x.size(1);
  problem.rank = update.rank();
  problem.float_adapters = update.lora_a.scalar_type() == at::kFloat;
  problem.dropout = update.dropout.enabled();
  problem.given_base = args.base.is_given();
  if (!problem.given_base) {
    problem.weight_row_major = args.base.weight.stride(1) == 1;
    problem.aligned_weight = aligned(args.base.weight);
  }
  problem.aligned_a = aligned(update.lora_a), problem.aligned_b = aligned(update.lora_b);
  return problem;
}

kernel::Matrix matrix_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), pitch_of(tensor), tensor.stride(1)};
}

template <class Args>
kernel::LoraLinearOperands common_operands(const Args& args, const at::Tensor& workspace) {
  kernel::LoraLinearOperands o{};
  const Update& update = args.update;
  const DropoutArgs& dropout = update.dropout;
  o.m = args.x.size(0), o.n = update.out_features(), o.k = args.x.size(1);
  o.rank = static_cast<int>(update.rank());
  o.x = args.x.const_data_ptr(), o.x_pitch = pitch_of(args.x);
  if (!args.base.is_given()) {
    o.weight = args.base.weight.const_data_ptr(), o.weight_pitch = pitch_of(args.base.weight);
  }
  o.a = matrix_of(update.lora_a), o.b = matrix_of(update.lora_b);
  o.float_adapters = update.lora_a.scalar_type() == at::kFloat;
  o.scaling = static_cast<float>(update.scaling);
  o.dropout = dropout.enabled();
  o.mask.keep_count = philox::kKeepOne, o.mask.keep_scale = 1.f;
  if (o.dropout) {
    o.mask = {dropout.seed->template const_data_ptr<int64_t>(), dropout.first_row(),
              dropout.first_col(), dropout.keep_count(), static_cast<float>(dropout.keep_scale())};
  }
  o.workspace = workspace.mutable_data_ptr<uint8_t>();
  return o;
}

at::Tensor workspace_for(const plan::Plan& plan, const at::Tensor& like) {
  return at::empty({plan.workspace}, like.options().dtype(at::kByte));
}

// The current stream of a CUDA device. Elsewhere, in tests, there is none.
void* stream_of(const at::Device& device) {
  if (!device.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Without an index a CUDA device is the current one.
int index_of(const at::Device& device) {
  if (device.has_index() || !device.is_cuda()) return device.index();
  return c10::impl::VirtualGuardImpl(device.type()).getDevice().index();
}

cuda::Half half_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? cuda::Half::kFloat16 : cuda::Half::kBFloat16;
}

void check_launch(const std::string& error, const at::Device& device) {
  if (error.empty()) return;
  // cudaErrorMemoryAllocation: what a caller may answer with a smaller batch.
  TORCH_CHECK_WITH(OutOfMemoryError, error.find("out of memory") == std::string::npos,
                   "lora_ext: launching the kernels on ", device, " failed: ", error);
  throw LaunchError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
                    c10::str("lora_ext: launching the kernels on ", device, " failed: ", error));
}

}  // namespace

bool has_kernels(const at::Device& device) { return cuda::has_kernels(device.is_cuda()); }

plan::Card card_of(const at::Device& device) {
  static std::mutex mutex;
  static std::unordered_map<int, plan::Card> cards;
  const int index = index_of(device);
  plan::Card card;
  {
    const std::lock_guard lock(mutex);
    const auto [known, missing] = cards.try_emplace(index);
    if (!missing) return known->second;
    card = known->second = cuda::card_of(index);
  }
  if (!card.error.empty())
    TORCH_WARN("lora_ext: the CUDA kernels cannot be used on ", device, ": ", card.error);
  return card;
}

std::optional<std::string> wait(const at::Device& device, double seconds) {
  const c10::DeviceGuard guard(device);
  return cuda::wait(stream_of(device), seconds);
}

bool is_capturing(const at::Device& device) { return cuda::is_capturing(stream_of(device)); }

plan::Problem problem_of(const ForwardArgs& args) {
  plan::Problem problem = common_problem(args);
  problem.half_dtype = is_half(args.x.scalar_type()) && args.y_dtype() == args.x.scalar_type();
  problem.aligned =
      aligned(args.x) && aligned_rows(problem.n) && (!problem.given_base || aligned(args.base.y));
  return problem;
}

plan::Problem problem_of(const BackwardArgs& args) {
  plan::Problem problem = common_problem(args);
  const at::ScalarType dtype = args.x.scalar_type();
  problem.half_dtype = is_half(dtype) && args.grad.scalar_type() == dtype;
  problem.aligned = aligned(args.grad) && aligned(args.x) && aligned_rows(problem.k);
  problem.need_dx = args.need_dx, problem.need_dlora_a = args.need_dlora_a;
  problem.need_dlora_b = args.need_dlora_b;
  return problem;
}

Forward run(const plan::Plan& plan, const ForwardArgs& args) {
  const at::Device device = args.x.device();
  const c10::DeviceGuard guard(device);
  const at::Tensor workspace = workspace_for(plan, args.x);
  Forward out{at::empty({args.x.size(0), args.update.out_features()}, args.x.options()),
              at::empty({args.x.size(0), args.update.rank()}, args.x.options().dtype(at::kFloat))};
  kernel::LoraLinearForward operands{};
  static_cast<kernel::LoraLinearOperands&>(operands) = common_operands(args, workspace);
  if (args.base.bias) {
    operands.bias = args.base.bias->const_data_ptr();
    operands.float_bias = args.base.bias->scalar_type() == at::kFloat;
  }
  if (args.base.is_given()) {
    operands.base = args.base.y.const_data_ptr(), operands.base_pitch = pitch_of(args.base.y);
  }
  operands.y = out.y.mutable_data_ptr(), operands.s = out.s.mutable_data_ptr<float>();
  check_launch(
      cuda::launch_forward(half_of(args.x.scalar_type()), plan, operands, stream_of(device)),
      device);
  if (plan.library_base()) add_base(out.y, args);
  return out;
}

Backward run(const plan::Plan& plan, const BackwardArgs& args) {
  const at::Device device = args.x.device();
  const c10::DeviceGuard guard(device);
  const at::Tensor workspace = workspace_for(plan, args.x);
  Backward out;
  if (args.need_dx) out.dx = at::empty({args.x.size(0), args.x.size(1)}, args.x.options());
  if (args.need_dlora_a)
    out.dlora_a = at::empty(args.update.lora_a.sizes(), args.update.lora_a.options());
  if (args.need_dlora_b)
    out.dlora_b = at::empty(args.update.lora_b.sizes(), args.update.lora_b.options());
  kernel::LoraLinearBackward operands{};
  static_cast<kernel::LoraLinearOperands&>(operands) = common_operands(args, workspace);
  operands.dy = args.grad.const_data_ptr(), operands.dy_pitch = pitch_of(args.grad);
  operands.s = args.s.const_data_ptr<float>();
  operands.dx = args.need_dx ? out.dx.mutable_data_ptr() : nullptr;
  operands.da = args.need_dlora_a ? out.dlora_a.mutable_data_ptr() : nullptr;
  operands.db = args.need_dlora_b ? out.dlora_b.mutable_data_ptr() : nullptr;
  check_launch(
      cuda::launch_backward(half_of(args.x.scalar_type()), plan, operands, stream_of(device)),
      device);
  if (plan.library_base() && args.need_dx) add_base(out.dx, args);
  return out;
}

}  // namespace lora_ext::kernel_launch
#endif  // LORA_EXT_WITH_CUDA
