// The op family of the torch library `lora_ext`: lora, lora_forward and lora_backward for one adapter,
// and lora_grouped, lora_grouped_forward and lora_grouped_backward for many.
//
// A schema has flat arguments; here they become the structs of common/call.h, for every backend.
// register_all takes the kernels of a backend, which take structs.
// The same kernel serves one adapter and many. They have separate schemas because list arguments
// cost a call from Python 1 us of 9, and because vmap (batched gradients) cannot take lists.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/call.h"

namespace lora_ext {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// An op of one adapter: its arguments are `own`, then x, the base and the update.
template <class Result, class... Own>
struct OneOp {
  using Kernel = Result(Own... own, const at::Tensor& x, const Base& base, const Update& update);

  template <Kernel kernel>
  static Result flat(Own... own, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& y, const at::Tensor& lora_a,
                     const at::Tensor& lora_b, double scaling,
                     const std::optional<at::Tensor>& bias, double dropout_p,
                     const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
                     c10::SymInt col_offset, bool cast_weight,
                     const std::optional<at::Tensor>& packed,
                     const std::optional<at::Tensor>& packed_t, int64_t row_block) {
    const at::Tensor none;
    return kernel(
        own..., x,
        {weight.value_or(none), bias, cast_weight, packed, packed_t, row_block, y.value_or(none)},
        Update::one(lora_a, lora_b, scaling,
                    {dropout_p, seed, std::move(row_offset), std::move(col_offset)}));
  }

  template <class Handle>
  static Result call(const Handle& op, Own... own, const at::Tensor& x, const Base& base,
                     const Update& u) {
    const DropoutArgs& d = u.dropout;
    return op.call(own..., x, optional(base.weight), optional(base.y), u.a(), u.b(), u.scaling,
                   base.bias, d.p, d.seed, d.row_offset, d.col_offset, base.cast_weight,
                   base.packed, base.packed_t, base.row_block);
  }
};

// The same for many adapters: a list of factors or a pool, a tensor of scalings, and the rows.
template <class Result, class... Own>
struct GroupedOp {
  using Kernel = Result(Own... own, const at::Tensor& x, const Base& base, const Update& update);

  template <Kernel kernel>
  static Result flat(Own... own, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& y, at::TensorList lora_a,
                     at::TensorList lora_b, const at::Tensor& scaling,
                     const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& offs,
                     const std::optional<at::Tensor>& ranks, const std::optional<at::Tensor>& bias,
                     double dropout_p, const std::optional<at::Tensor>& seed,
                     c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
                     const std::optional<at::Tensor>& packed,
                     const std::optional<at::Tensor>& packed_t, int64_t row_block) {
    const at::Tensor none;
    return kernel(
        own..., x,
        {weight.value_or(none), bias, cast_weight, packed, packed_t, row_block, y.value_or(none)},
        {{lora_a.begin(), lora_a.end()},
         {lora_b.begin(), lora_b.end()},
         1.0,
         {dropout_p, seed, std::move(row_offset), std::move(col_offset)},
         Grouping{scaling, index, offs, ranks}});
  }

  template <class Handle>
  static Result call(const Handle& op, Own... own, const at::Tensor& x, const Base& base,
                     const Update& u) {
    const DropoutArgs& d = u.dropout;
    const Grouping& g = *u.grouping;
    return op.call(own..., x, optional(base.weight), optional(base.y), u.lora_a, u.lora_b,
                   g.scaling, g.index, g.offs, g.ranks, base.bias, d.p, d.seed, d.row_offset,
                   d.col_offset, base.cast_weight, base.packed, base.packed_t, base.row_block);
  }
};

using YAndS = std::tuple<at::Tensor, at::Tensor>;  // [..., N] and [M, r]
using Lora = OneOp<at::Tensor>;
using LoraGrouped = GroupedOp<at::Tensor>;
using LoraForward = OneOp<YAndS>;
using LoraGroupedForward = GroupedOp<YAndS>;

// Gradients of x, of those of lora_a and of lora_b that are requested, and of the bias. The gradient
// of a given y is grad itself.
using Gradients =
    std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor>;
using BackwardKernel = Gradients(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                                 const at::Tensor& x, const Base& base, const Update& update);

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// wanted: dx, dlora_a, dlora_b, dbias.
using LoraBackward = OneOp<FourTensors, const at::Tensor& /*grad*/, const at::Tensor& /*s*/,
                           std::array<bool, 4> /*wanted*/>;
// wanted: dx and dbias.
using LoraGroupedBackward =
    GroupedOp<Gradients, const at::Tensor& /*grad*/, const at::Tensor& /*s*/,
              std::array<bool, 2> /*wanted*/, const c10::List<bool>& /*wanted_a*/,
              const c10::List<bool>& /*wanted_b*/>;

// A backward kernel as each of the two ops calls it.
template <BackwardKernel kernel>
FourTensors backward_of_one(const at::Tensor& grad, const at::Tensor& s, std::array<bool, 4> wanted,
                            const at::Tensor& x, const Base& base, const Update& update) {
  const auto [dx, da, db, dbias] = kernel(
      grad, s, {wanted[0], NeedsGrad{wanted[1]}, NeedsGrad{wanted[2]}, wanted[3]}, x, base, update);
  return {dx, da.empty() ? at::Tensor() : da[0], db.empty() ? at::Tensor() : db[0], dbias};
}

template <BackwardKernel kernel>
Gradients backward_of_many(const at::Tensor& grad, const at::Tensor& s, std::array<bool, 2> wanted,
                           const c10::List<bool>& wanted_a, const c10::List<bool>& wanted_b,
                           const at::Tensor& x, const Base& base, const Update& update) {
  return kernel(grad, s,
                {wanted[0], NeedsGrad(wanted_a.begin(), wanted_a.end()),
                 NeedsGrad(wanted_b.begin(), wanted_b.end()), wanted[1]},
                x, base, update);
}

// Registers a backend's kernels: each serves one adapter and many.
template <Lora::Kernel kernel>
void register_lora(torch::Library& m) {
  m.impl("lora", TORCH_FN(Lora::flat<kernel>));
  m.impl("lora_grouped", TORCH_FN(LoraGrouped::flat<kernel>));
}

template <BackwardKernel kernel>
void register_backward(torch::Library& m) {
  m.impl("lora_backward", TORCH_FN(LoraBackward::flat<backward_of_one<kernel>>));
  m.impl("lora_grouped_backward", TORCH_FN(LoraGroupedBackward::flat<backward_of_many<kernel>>));
}

template <Lora::Kernel lora, LoraForward::Kernel forward, BackwardKernel backward>
void register_all(torch::Library& m) {
  register_lora<lora>(m);
  m.impl("lora_forward", TORCH_FN(LoraForward::flat<forward>));
  m.impl("lora_grouped_forward", TORCH_FN(LoraGroupedForward::flat<forward>));
  register_backward<backward>(m);
}

// Calls through the dispatcher, of the op for one adapter or for many, by what the update has.
namespace ops {

at::Tensor lora(const at::Tensor& x, const Base& base, const Update& update);
YAndS lora_forward(const at::Tensor& x, const Base& base, const Update& update);
BackwardKernel lora_backward;

}  // namespace ops
}  // namespace lora_ext
