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

bool has_float_adapters(const Update& update) {
  const ExpertRows* experts = update.experts();
  return experts ? experts->float_adapters : update.a().scalar_type() == at::kFloat;
}

template <class Args>
plan::Problem common_problem(const Args& args) {
  plan::Problem problem{};
  const Update& update = args.update;
  problem.m = update.rows(args.x), problem.n = update.out_features(), problem.k = args.x.size(1);
  problem.rank = update.rank();
  problem.float_adapters = has_float_adapters(update);
  problem.dropout = update.dropout.enabled();
  problem.given_base = args.base.is_given();
  const bool experts = args.base.of_experts();
  if (!problem.given_base) {
    const at::Tensor& weight = args.base.weight;
    problem.weight_row_major = weight.stride(-1) == 1;
    problem.aligned_weight = experts ? aligned_stack(weight) : aligned(weight);
  }
  if (!update.is_one()) {
    problem.groups = plan::Groups{update.adapters(), update.grouping->index.has_value(),
                                  !update.is_pool(), experts};
    return problem;
  }
  problem.aligned_a = aligned(update.a()), problem.aligned_b = aligned(update.b());
  problem.factor_rows = update.a().stride(1) == 1 && update.b().stride(1) == 1;
  return problem;
}

void* gradient_at(const at::Tensor& gradient) {
  return gradient.defined() ? gradient.mutable_data_ptr() : nullptr;
}

kernel::Matrix matrix_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), pitch_of(tensor), tensor.stride(1)};
}

const int32_t* numbers(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<int32_t>() : nullptr;
}

// Operands of experts beside those of many adapters.
void set_experts(kernel::LoraGroupedOperands& o, const Base& base, const Update& update) {
  const ExpertRows* rows = update.experts();
  if (rows == nullptr) return;
  o.weight_stride = base.weight.stride(0);
  o.bias_stride = base.bias ? base.bias->stride(0) : 0;
  o.first_weight = static_cast<int>(rows->first);
  o.end_weight = static_cast<int>(rows->first + base.weight.size(0));
  o.tables = rows->tables ? rows->tables->mutable_data_ptr<uint8_t>() : nullptr;
  o.t = rows->t ? rows->t->const_data_ptr() : nullptr;
  o.groups_per_weight = static_cast<int>(rows->adapters);
  o.places = {numbers(rows->x), numbers(rows->grad), nullptr, numbers(rows->mask)};
}

// In PEFT's layout, [G r, K] and [N, r G].
kernel::LoraGroupedMatrices gradients_of_experts(const Update& update, const Backward& out) {
  const int64_t rank = update.rank(), experts = update.adapters();
  kernel::LoraGroupedFactors pool{};
  pool.a = gradient_at(out.dlora_a[0]), pool.b = gradient_at(out.dlora_b[0]);
  pool.a_pitch = update.in_features(), pool.a_stride = rank * pool.a_pitch;
  pool.b_stride = 1, pool.b_pitch = rank * experts, pool.b_step = experts;
  return {pool, nullptr};
}

void set_adapter(kernel::LoraLinearOperands& o, const Update& update) {
  o.rank = static_cast<int>(update.rank());
  o.a = matrix_of(update.a()), o.b = matrix_of(update.b());
  o.scaling = static_cast<float>(update.scaling);
}

// Whether a call for a slice of experts goes on with one for those before.
bool goes_on(const Update& update) { return update.experts() && update.experts()->goes_on(); }

// A new workspace, or the one to go on with.
at::Tensor workspace_for(const plan::Plan& plan, const Update& update, const at::Tensor& x) {
  if (!goes_on(update)) return at::empty({plan.workspace}, x.options().dtype(at::kByte));
  const at::Tensor& own = update.experts()->workspace;
  TORCH_CHECK(own.numel() == plan.workspace,
              "lora_ext: expected for further experts the workspace of the first, of ",
              plan.workspace, " bytes as planned now, but got ", own.numel(),
              ": change no setting of the planner during a call");
  return own;
}

// The operands of one adapter, or of many, already have the adapters and their gradients. Returns
// the workspace.
template <class Operands, class Args>
at::Tensor launch(const plan::Plan& plan, const Args& args, Operands& o) {
  const Update& update = args.update;
  o.m = update.rows(args.x), o.n = update.out_features(), o.k = args.x.size(1);
  o.x = args.x.const_data_ptr(), o.x_pitch = pitch_of(args.x);
  if (!args.base.is_given()) {
    const at::Tensor& weight = args.base.weight;
    o.weight = weight.const_data_ptr(),
    o.weight_pitch = pitch_of(args.base.of_experts() ? first_matrix(weight) : weight);
  }
  o.float_adapters = has_float_adapters(update);
  o.dropout = update.dropout.enabled();
  o.mask = mask_of(update.dropout);
  if (update.experts()) o.mask.keep_scale = 1.f;
  const at::Tensor workspace = workspace_for(plan, update, args.x);
  o.workspace = workspace.mutable_data_ptr<uint8_t>();
  const at::Device device = args.x.device();
  check_launch(cuda::launch_lora(dtype_of(args.x.scalar_type()), plan, o, stream_of(device)),
               device);
  return workspace;
}

template <class Operands>
at::Tensor launch_forward(const plan::Plan& plan, const ForwardArgs& args, const Forward& out,
                          Operands& operands) {
  if (args.base.bias) {
    operands.bias = args.base.bias->const_data_ptr();
    operands.float_bias = args.base.bias->scalar_type() == at::kFloat;
  }
  if (args.base.is_given()) {
    operands.base = args.base.y.const_data_ptr(), operands.base_pitch = pitch_of(args.base.y);
  }
  operands.y = out.y.mutable_data_ptr();
  if (out.s.defined()) operands.s = out.s.mutable_data_ptr<float>();
  if (const plan::Decode* decode = plan.decode())
    operands.counts = decode_counts(args.x.device(), decode->flag_count());
  return launch(plan, args, operands);
}

template <class Operands>
at::Tensor launch_backward(const plan::Plan& plan, const BackwardArgs& args, const Backward& out,
                           Operands& operands) {
  operands.dy = args.grad.const_data_ptr(), operands.dy_pitch = pitch_of(args.grad);
  operands.s = args.s.const_data_ptr<float>();
  operands.dx = args.wanted.dx ? out.dx.mutable_data_ptr() : nullptr;
  return launch(plan, args, operands);
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

Backward empty_gradients(const Update& update, const Wanted& wanted) {
  if (update.experts() == nullptr) {
    return {{},
            empty_gradients(update.lora_a, wanted.any_a()),
            empty_gradients(update.lora_b, wanted.any_b())};
  }
  Backward out = Backward::one();
  const int64_t all = update.rank() * update.adapters();
  const at::ScalarType half = update.lora_a[0].scalar_type();
  const auto options =
      update.lora_a[0].options().dtype(update.experts()->float_adapters ? at::kFloat : half);
  if (wanted.any_a()) out.da() = at::empty({all, update.in_features()}, options);
  if (wanted.any_b()) out.db() = at::empty({update.out_features(), all}, options);
  return out;
}

void forget_unwanted(Factors& gradients, const NeedsGrad& wanted) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wanted[i]) gradients[i] = at::Tensor();
  }
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
  const int64_t rows = update.rows(args.x);
  Forward out;
  if (goes_on(update)) {
    out.y = update.experts()->out;
  } else {
    out.y = at::empty({rows, update.out_features()}, args.x.options());
    out.s = at::empty({rows, update.rank()}, args.x.options().dtype(at::kFloat));
  }
  if (update.is_one()) {
    kernel::LoraLinearForward operands{};
    set_adapter(operands, update);
    launch_forward(plan, args, out, operands);
  } else {
    const GroupedOperands many(update);
    kernel::LoraGroupedForward operands{};
    many.set(operands, rows);
    set_experts(operands, args.base, update);
    const at::Tensor workspace = launch_forward(plan, args, out, operands);
    if (update.experts()) out.workspace = workspace;
  }
  if (plan.library_base()) add_base_forward(out.y, args.x, args.base);
  return out;
}

Backward run(const plan::Plan& plan, const BackwardArgs& args) {
  const c10::DeviceGuard guard(args.x.device());
  const Update& update = args.update;
  const Wanted& wanted = args.wanted;
  const int64_t rows = update.rows(args.x);
  Backward out = goes_on(update) ? Backward::one() : empty_gradients(update, wanted);
  if (wanted.dx)
    out.dx = goes_on(update) ? update.experts()->out
                             : at::empty({rows, args.x.size(1)}, args.x.options());
  if (update.is_one()) {
    kernel::LoraLinearBackward operands{};
    set_adapter(operands, update);
    operands.da = gradient_at(out.da()), operands.db = gradient_at(out.db());
    launch_backward(plan, args, out, operands);
  } else {
    const GroupedOperands many(update);
    kernel::LoraGroupedBackward operands{};
    many.set(operands, rows);
    set_experts(operands, args.base, update);
    std::optional<GroupedMatrices> gradients;
    if (const ExpertRows* experts = update.experts()) {
      operands.gradients = gradients_of_experts(update, out);
      if (experts->weights) {
        operands.row_weights = {experts->weights->const_data_ptr(),
                                experts->weights->scalar_type() == at::kFloat,
                                numbers(experts->slots)};
      }
    } else {
      operands.gradients = gradients.emplace(update, out.dlora_a, out.dlora_b).matrices();
    }
    operands.need_da = wanted.any_a(), operands.need_db = wanted.any_b();
    const at::Tensor workspace = launch_backward(plan, args, out, operands);
    if (update.experts()) out.workspace = workspace;
  }
  if (plan.library_base() && wanted.dx) add_base_backward(out.dx, args.grad, args.base);
  forget_unwanted(out.dlora_a, wanted.dlora_a);
  forget_unwanted(out.dlora_b, wanted.dlora_b);
  return out;
}

}  // namespace lora_ext::kernel_launch
