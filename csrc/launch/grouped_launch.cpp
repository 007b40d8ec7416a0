#include "launch/grouped_launch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/lora_grouped.h"
#include "launch/decode_counts.h"
#include "launch/launch_parts.h"
#include "library/base_linear.h"

namespace lora_ext::kernel_launch {
namespace {

template <class Args>
plan::Problem grouped_problem(const Args& args) {
  plan::Problem problem{};
  const GroupedUpdate& update = args.update;
  problem.m = args.x.size(0), problem.n = update.out_features(), problem.k = args.x.size(1);
  problem.rank = update.max_rank();
  problem.float_adapters = update.lora_a[0].scalar_type() == at::kFloat;
  problem.dropout = update.dropout.enabled();
  problem.given_base = args.base.is_given();
  if (!problem.given_base) {
    problem.weight_row_major = args.base.weight.stride(1) == 1;
    problem.aligned_weight = aligned(args.base.weight);
  }
  problem.groups = plan::Groups{update.adapters(), update.index.has_value(), !update.is_pool()};
  return problem;
}

// A matrix, or a pool of them, whose rows have unit stride: itself, or a copy.
at::Tensor with_rows(const at::Tensor& factor) {
  return factor.stride(-1) == 1 ? factor : factor.contiguous();
}

// Factors or gradients, and what keeps their memory until the launch: on the stream, freed memory
// is not used again before the kernels have ended.
struct Matrices {
  kernel::LoraGroupedMatrices matrices{};
  std::vector<at::Tensor> kept;
  std::vector<kernel::LoraGroupedEntry> entries;

  // `of` of both are lists or pools; an undefined tensor is a gradient that is not wanted.
  Matrices(const GroupedUpdate& update, const std::vector<at::Tensor>& a,
           const std::vector<at::Tensor>& b) {
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
    const auto pitch = [](const at::Tensor& t) { return t.defined() ? t.stride(-2) : 0; };
    if (update.is_pool()) {
      kernel::LoraGroupedFactors& pool = matrices.pool;
      pool.a = data(a[0]), pool.b = data(b[0]);
      pool.a_stride = a[0].defined() ? a[0].stride(0) : 0;
      pool.b_stride = b[0].defined() ? b[0].stride(0) : 0;
      pool.a_pitch = pitch(a[0]), pool.b_pitch = pitch(b[0]);
      // Without ranks, every slot has the whole rank.
      kept.push_back(update.ranks ? update.ranks->contiguous()
                                  : at::full({update.adapters()}, update.max_rank(),
                                             update.scaling.options().dtype(at::kInt)));
      pool.ranks = kept.back().const_data_ptr<int32_t>();
      return;
    }
    entries.reserve(a.size());
    for (size_t g = 0; g < a.size(); ++g) {
      entries.push_back({data(a[g]), data(b[g]), pitch(a[g]), pitch(b[g]),
                         static_cast<int>(update.lora_a[g].size(0))});
    }
    matrices.list = entries.data();
  }
};

std::vector<at::Tensor> with_rows(const std::vector<at::Tensor>& factors) {
  std::vector<at::Tensor> out;
  out.reserve(factors.size());
  for (const at::Tensor& factor : factors) out.push_back(with_rows(factor));
  return out;
}

// What is read on the device, as the kernels read it.
struct Numbers {
  at::Tensor scaling, index, offs;

  explicit Numbers(const GroupedUpdate& update) : scaling(update.scaling.contiguous()) {
    if (update.index) index = update.index->reshape({-1}).contiguous();
    if (update.offs) offs = update.offs->contiguous();
  }
};

template <class Args>
kernel::LoraGroupedOperands common_operands(const Args& args, const Numbers& numbers,
                                            const Matrices& factors, const at::Tensor& workspace) {
  kernel::LoraGroupedOperands o{};
  const GroupedUpdate& update = args.update;
  o.m = args.x.size(0), o.n = update.out_features(), o.k = args.x.size(1);
  o.rows.index = numbers.index.defined() ? numbers.index.const_data_ptr<int32_t>() : nullptr;
  o.rows.ends = numbers.offs.defined() ? numbers.offs.const_data_ptr<int32_t>() : nullptr;
  o.rows.m = static_cast<int>(o.m), o.rows.groups = static_cast<int>(update.adapters());
  o.rows.most_rank = static_cast<int>(update.max_rank());
  o.scaling = numbers.scaling.const_data_ptr<float>();
  o.factors = factors.matrices;
  o.float_adapters = update.lora_a[0].scalar_type() == at::kFloat;
  o.x = args.x.const_data_ptr(), o.x_pitch = pitch_of(args.x);
  if (!args.base.is_given()) {
    o.weight = args.base.weight.const_data_ptr(), o.weight_pitch = pitch_of(args.base.weight);
  }
  o.dropout = update.dropout.enabled();
  o.mask = mask_of(update.dropout);
  o.workspace = workspace.mutable_data_ptr<uint8_t>();
  return o;
}

bool any(const std::vector<bool>& wanted) {
  return std::find(wanted.begin(), wanted.end(), true) != wanted.end();
}

// Of all, if one is wanted: the kernels make those of one kind together.
std::vector<at::Tensor> gradients_of(const std::vector<at::Tensor>& factors,
                                     const std::vector<bool>& wanted) {
  std::vector<at::Tensor> out(factors.size());
  if (!any(wanted)) return out;
  for (size_t i = 0; i < factors.size(); ++i) {
    out[i] = at::empty(factors[i].sizes(), factors[i].options());
  }
  return out;
}

void forget_unwanted(std::vector<at::Tensor>& gradients, const std::vector<bool>& wanted) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wanted[i]) gradients[i] = at::Tensor();
  }
}

}  // namespace

plan::Problem problem_of(const GroupedForwardArgs& args) {
  plan::Problem problem = grouped_problem(args);
  problem.half_dtype = is_half(args.x.scalar_type()) && args.y_dtype() == args.x.scalar_type();
  problem.aligned =
      aligned(args.x) && aligned_rows(problem.n) && (!problem.given_base || aligned(args.base.y));
  return problem;
}

plan::Problem problem_of(const GroupedBackwardArgs& args) {
  plan::Problem problem = grouped_problem(args);
  problem.backward = true;
  const at::ScalarType dtype = args.x.scalar_type();
  problem.half_dtype = is_half(dtype) && args.grad.scalar_type() == dtype;
  problem.aligned = aligned(args.grad) && aligned(args.x) && aligned_rows(problem.k);
  problem.need_dx = args.need_dx;
  problem.need_dlora_a = any(args.need_dlora_a), problem.need_dlora_b = any(args.need_dlora_b);
  return problem;
}

GroupedForward run(const plan::Plan& plan, const GroupedForwardArgs& args) {
  const at::Device device = args.x.device();
  const c10::DeviceGuard guard(device);
  const GroupedUpdate& update = args.update;
  const at::Tensor workspace = workspace_for(plan.workspace, args.x);
  const Numbers numbers(update);
  const std::vector<at::Tensor> a = with_rows(update.lora_a), b = with_rows(update.lora_b);
  const Matrices factors(update, a, b);
  GroupedForward out{
      at::empty({args.x.size(0), update.out_features()}, args.x.options()),
      at::empty({args.x.size(0), update.max_rank()}, args.x.options().dtype(at::kFloat))};
  kernel::LoraGroupedForward operands{};
  static_cast<kernel::LoraGroupedOperands&>(operands) =
      common_operands(args, numbers, factors, workspace);
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
  check_launch(cuda::launch_grouped_forward(half_of(args.x.scalar_type()), plan, operands,
                                            stream_of(device)),
               device);
  if (plan.library_base()) add_base_forward(out.y, args.x, args.base);
  return out;
}

GroupedBackward run(const plan::Plan& plan, const GroupedBackwardArgs& args) {
  const at::Device device = args.x.device();
  const c10::DeviceGuard guard(device);
  const GroupedUpdate& update = args.update;
  const at::Tensor workspace = workspace_for(plan.workspace, args.x);
  const Numbers numbers(update);
  const std::vector<at::Tensor> a = with_rows(update.lora_a), b = with_rows(update.lora_b);
  const Matrices factors(update, a, b);
  GroupedBackward out{{},
                      gradients_of(update.lora_a, args.need_dlora_a),
                      gradients_of(update.lora_b, args.need_dlora_b)};
  const Matrices gradients(update, out.dlora_a, out.dlora_b);
  if (args.need_dx) out.dx = at::empty({args.x.size(0), args.x.size(1)}, args.x.options());
  kernel::LoraGroupedBackward operands{};
  static_cast<kernel::LoraGroupedOperands&>(operands) =
      common_operands(args, numbers, factors, workspace);
  operands.dy = args.grad.const_data_ptr(), operands.dy_pitch = pitch_of(args.grad);
  operands.s = args.s.const_data_ptr<float>();
  operands.dx = args.need_dx ? out.dx.mutable_data_ptr() : nullptr;
  operands.gradients = gradients.matrices;
  operands.need_da = any(args.need_dlora_a), operands.need_db = any(args.need_dlora_b);
  check_launch(cuda::launch_grouped_backward(half_of(args.x.scalar_type()), plan, operands,
                                             stream_of(device)),
               device);
  if (plan.library_base() && args.need_dx) add_base_backward(out.dx, args.grad, args.base);
  forget_unwanted(out.dlora_a, args.need_dlora_a);
  forget_unwanted(out.dlora_b, args.need_dlora_b);
  return out;
}

}  // namespace lora_ext::kernel_launch
