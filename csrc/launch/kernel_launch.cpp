#include "launch/kernel_launch.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <mutex>
#include <unordered_map>

#include "cuda/device.h"
#include "cuda/lora_linear.h"
#include "launch/decode_counts.h"
#include "launch/launch_parts.h"
#include "library/base_linear.h"

namespace lora_ext::kernel_launch {
namespace {

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
  problem.factor_rows = update.lora_a.stride(1) == 1 && update.lora_b.stride(1) == 1;
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
  o.mask = mask_of(dropout);
  o.workspace = workspace.mutable_data_ptr<uint8_t>();
  return o;
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
  problem.backward = true;
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
  const at::Tensor workspace = workspace_for(plan.workspace, args.x);
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
  if (const plan::Decode* decode = plan.decode())
    operands.counts = decode_counts(device, decode->flag_count());
  check_launch(
      cuda::launch_forward(half_of(args.x.scalar_type()), plan, operands, stream_of(device)),
      device);
  if (plan.library_base()) add_base_forward(out.y, args.x, args.base);
  return out;
}

Backward run(const plan::Plan& plan, const BackwardArgs& args) {
  const at::Device device = args.x.device();
  const c10::DeviceGuard guard(device);
  const at::Tensor workspace = workspace_for(plan.workspace, args.x);
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
  if (plan.library_base() && args.need_dx) add_base_backward(out.dx, args.grad, args.base);
  return out;
}

}  // namespace lora_ext::kernel_launch
