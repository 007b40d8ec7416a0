#include "op/launch/kernel_launch.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <mutex>
#include <unordered_map>

#include "common/base_linear.h"
#include "kernels/device.h"
#include "kernels/lora_grouped.h"
#include "op/launch/launch_parts.h"

namespace lora_ext::kernel_launch {
namespace {

template <class Args>
plan::Problem common_problem(const Args& args) {
  plan::Problem problem{};
  const Update& update = args.update;
  problem.m = args.x.size(0), problem.n = update.out_features(), problem.k = args.x.size(1);
  problem.rank = update.rank();
  problem.float_adapters = update.a().scalar_type() == at::kFloat;
  problem.dropout = update.dropout.enabled();
  problem.given_base = args.base.is_given();
  if (!problem.given_base) {
    problem.weight_row_major = args.base.weight.stride(1) == 1;
    problem.aligned_weight = aligned(args.base.weight);
  }
  if (!update.is_one()) {
    problem.groups =
        plan::Groups{update.adapters(), update.grouping->index.has_value(), !update.is_pool()};
    return problem;
  }
  problem.aligned_a = aligned(update.a()), problem.aligned_b = aligned(update.b());
  problem.factor_rows = update.a().stride(1) == 1 && update.b().stride(1) == 1;
  return problem;
}

kernel::Matrix matrix_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), pitch_of(tensor), tensor.stride(1)};
}

void set_adapter(kernel::LoraLinearOperands& o, const Update& update) {
  o.rank = static_cast<int>(update.rank());
  o.a = matrix_of(update.a()), o.b = matrix_of(update.b());
  o.scaling = static_cast<float>(update.scaling);
}

// The operands of one adapter, or of many, already have the adapters and their gradients.
template <class Operands, class Args>
void launch(const plan::Plan& plan, const Args& args, Operands& o) {
  const Update& update = args.update;
  o.m = args.x.size(0), o.n = update.out_features(), o.k = args.x.size(1);
  o.x = args.x.const_data_ptr(), o.x_pitch = pitch_of(args.x);
  if (!args.base.is_given()) {
    o.weight = args.base.weight.const_data_ptr(), o.weight_pitch = pitch_of(args.base.weight);
  }
  o.float_adapters = update.a().scalar_type() == at::kFloat;
  o.dropout = update.dropout.enabled();
  o.mask = mask_of(update.dropout);
  const at::Tensor workspace = at::empty({plan.workspace}, args.x.options().dtype(at::kByte));
  o.workspace = workspace.mutable_data_ptr<uint8_t>();
  const at::Device device = args.x.device();
  check_launch(cuda::launch_lora(dtype_of(args.x.scalar_type()), plan, o, stream_of(device)),
               device);
}

template <class Operands>
void launch_forward(const plan::Plan& plan, const ForwardArgs& args, const Forward& out,
                    Operands& operands) {
  if (args.base.bias) {
    operands.bias = args.base.bias->const_data_ptr();
    operands.float_bias = args.base.bias->scalar_type() == at::kFloat;
  }
  if (args.base.is_given()) {
    operands.base = args.base.y.const_data_ptr(), operands.base_pitch = pitch_of(args.base.y);
  }
  operands.y = out.y.mutable_data_ptr(), operands.s = out.s.mutable_data_ptr<float>();
  if (const plan::Decode* decode = plan.decode())
    operands.counts = decode_counts(args.x.device(), decode->flag_count());
  launch(plan, args, operands);
}

template <class Operands>
void launch_backward(const plan::Plan& plan, const BackwardArgs& args, const Backward& out,
                     Operands& operands) {
  operands.dy = args.grad.const_data_ptr(), operands.dy_pitch = pitch_of(args.grad);
  operands.s = args.s.const_data_ptr<float>();
  operands.dx = args.wanted.dx ? out.dx.mutable_data_ptr() : nullptr;
  launch(plan, args, operands);
}

// Allocates the gradients of all factors of a kind if one is requested: the kernels compute them
// together.
Factors empty_gradients(at::TensorList factors, bool any_wanted) {
  Factors out(factors.size());
  if (!any_wanted) return out;
  for (size_t i = 0; i < factors.size(); ++i) {
    out[i] = at::empty(factors[i].sizes(), factors[i].options());
  }
  return out;
}

void forget_unwanted(Factors& gradients, const NeedsGrad& wanted) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wanted[i]) gradients[i] = at::Tensor();
  }
}

void* gradient_at(const at::Tensor& gradient) {
  return gradient.defined() ? gradient.mutable_data_ptr() : nullptr;
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
  problem.dtype = dtype_of(c10::promoteTypes(args.x.scalar_type(), args.y_dtype()));
  problem.aligned = aligned(args.x) && aligned_rows(problem.n, problem.dtype) &&
                    (!problem.given_base || aligned(args.base.y));
  return problem;
}

plan::Problem problem_of(const BackwardArgs& args) {
  plan::Problem problem = common_problem(args);
  problem.backward = true;
  problem.dtype = dtype_of(c10::promoteTypes(args.x.scalar_type(), args.grad.scalar_type()));
  problem.aligned = aligned(args.grad) && aligned(args.x) && aligned_rows(problem.k, problem.dtype);
  problem.need_dx = args.wanted.dx, problem.need_dlora_a = args.wanted.any_a();
  problem.need_dlora_b = args.wanted.any_b();
  return problem;
}

Forward run(const plan::Plan& plan, const ForwardArgs& args) {
  const c10::DeviceGuard guard(args.x.device());
  const Update& update = args.update;
  const int64_t rows = args.x.size(0);
  Forward out{at::empty({rows, update.out_features()}, args.x.options()),
              at::empty({rows, update.rank()}, args.x.options().dtype(at::kFloat))};
  if (update.is_one()) {
    kernel::LoraLinearForward operands{};
    set_adapter(operands, update);
    launch_forward(plan, args, out, operands);
  } else {
    const GroupedOperands many(update);
    kernel::LoraGroupedForward operands{};
    many.set(operands, rows);
    launch_forward(plan, args, out, operands);
  }
  if (plan.library_base()) add_base_forward(out.y, args.x, args.base);
  return out;
}

Backward run(const plan::Plan& plan, const BackwardArgs& args) {
  const c10::DeviceGuard guard(args.x.device());
  const Update& update = args.update;
  const Wanted& wanted = args.wanted;
  Backward out{wanted.dx ? at::empty(args.x.sizes(), args.x.options()) : at::Tensor(),
               empty_gradients(update.lora_a, wanted.any_a()),
               empty_gradients(update.lora_b, wanted.any_b())};
  if (update.is_one()) {
    kernel::LoraLinearBackward operands{};
    set_adapter(operands, update);
    operands.da = gradient_at(out.da()), operands.db = gradient_at(out.db());
    launch_backward(plan, args, out, operands);
  } else {
    const GroupedOperands many(update);
    const GroupedMatrices gradients(update, out.dlora_a, out.dlora_b);
    kernel::LoraGroupedBackward operands{};
    many.set(operands, args.x.size(0));
    operands.gradients = gradients.matrices();
    operands.need_da = wanted.any_a(), operands.need_db = wanted.any_b();
    launch_backward(plan, args, out, operands);
  }
  if (plan.library_base() && wanted.dx) add_base_backward(out.dx, args.grad, args.base);
  forget_unwanted(out.dlora_a, wanted.dlora_a);
  forget_unwanted(out.dlora_b, wanted.dlora_b);
  return out;
}

}  // namespace lora_ext::kernel_launch
