// The op family of the torch library `lora_ext`: lora, lora_grouped, lora_forward, lora_backward.
//
// A schema has flat arguments; here they become the structs of common/call.h, for every backend.
// LoraForward::flat<kernel> is what TORCH_LIBRARY_IMPL registers for a kernel that takes structs,
// and ops::lora_forward calls that op through the dispatcher, on the backend of the tensors.
//
// One kernel serves lora, which takes one adapter, and lora_grouped, which takes a list of adapters
// or a pool. They are two schemas because list arguments cost a call from Python 1 us, a tenth of
// its overhead.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/call.h"

namespace lora_ext {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// An op whose arguments are first some of its own (Own), then x, the base and the update.
template <class Result, class... Own>
struct Op {
  using Kernel = Result(Own... own, const at::Tensor& x, const Base& base, const Update& update);

  template <Kernel kernel>
  static Result flat(Own... own, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& y, at::TensorList lora_a,
                     at::TensorList lora_b, double scaling, const std::optional<at::Tensor>& bias,
                     double dropout_p, const std::optional<at::Tensor>& seed,
                     c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
                     const std::optional<at::Tensor>& packed,
                     const std::optional<at::Tensor>& packed_t, int64_t row_block,
                     const std::optional<at::Tensor>& scalings,
                     const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& offs,
                     const std::optional<at::Tensor>& ranks) {
    const at::Tensor none;
    Update update{{lora_a.begin(), lora_a.end()},
                  {lora_b.begin(), lora_b.end()},
                  scaling,
                  {dropout_p, seed, std::move(row_offset), std::move(col_offset)}};
    if (scalings || index || offs || ranks) {
      update.grouping = Grouping{scalings.value_or(none), index, offs, ranks};
    }
    return kernel(
        own..., x,
        {weight.value_or(none), bias, cast_weight, packed, packed_t, row_block, y.value_or(none)},
        update);
  }

  static auto find(const char* name) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(name, "")
        .template typed<decltype(flat<nullptr>)>();
  }

  template <class Handle>
  static Result call(const Handle& op, Own... own, const at::Tensor& x, const Base& base,
                     const Update& u) {
    const DropoutArgs& d = u.dropout;
    std::optional<at::Tensor> scalings, index, offs, ranks;
    if (u.grouping) {
      scalings = u.grouping->scaling, index = u.grouping->index;
      offs = u.grouping->offs, ranks = u.grouping->ranks;
    }
    return op.call(own..., x, optional(base.weight), optional(base.y), u.lora_a, u.lora_b,
                   u.scaling, base.bias, d.p, d.seed, d.row_offset, d.col_offset, base.cast_weight,
                   base.packed, base.packed_t, base.row_block, scalings, index, offs, ranks);
  }
};

// The gradients of x, of the tensors of lora_a and lora_b whose gradient is requested, and of the
// bias. The gradient of a given y is grad itself.
using Gradients =
    std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor>;
// Whether the gradients of x and of the bias are requested.
using WantedOfBase = std::array<bool, 2>;

using LoraGrouped = Op<at::Tensor>;
using LoraForward = Op<std::tuple<at::Tensor, at::Tensor>>;  // y [..., N] and S
using LoraBackward =
    Op<Gradients, const at::Tensor& /*grad*/, const at::Tensor& /*s*/, WantedOfBase,
       const c10::List<bool>& /*of each of lora_a*/, const c10::List<bool>& /*of each of lora_b*/>;

// lora_grouped for one adapter.
struct Lora {
  template <LoraGrouped::Kernel kernel>
  static at::Tensor flat(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& y, const at::Tensor& lora_a,
                         const at::Tensor& lora_b, double scaling,
                         const std::optional<at::Tensor>& bias, double dropout_p,
                         const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
                         c10::SymInt col_offset, bool cast_weight,
                         const std::optional<at::Tensor>& packed,
                         const std::optional<at::Tensor>& packed_t, int64_t row_block) {
    const at::Tensor none;
    return kernel(
        x,
        {weight.value_or(none), bias, cast_weight, packed, packed_t, row_block, y.value_or(none)},
        Update::one(lora_a, lora_b, scaling,
                    {dropout_p, seed, std::move(row_offset), std::move(col_offset)}));
  }

  static at::Tensor call(const at::Tensor& x, const Base& base, const Update& u) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("lora_ext::lora", "")
                               .typed<decltype(flat<nullptr>)>();
    const DropoutArgs& d = u.dropout;
    return op.call(x, optional(base.weight), optional(base.y), u.a(), u.b(), u.scaling, base.bias,
                   d.p, d.seed, d.row_offset, d.col_offset, base.cast_weight, base.packed,
                   base.packed_t, base.row_block);
  }
};

namespace ops {

// lora or lora_grouped.
inline at::Tensor lora(const at::Tensor& x, const Base& base, const Update& update) {
  if (update.is_one()) return Lora::call(x, base, update);
  static const auto op = LoraGrouped::find("lora_ext::lora_grouped");
  return LoraGrouped::call(op, x, base, update);
}

inline std::tuple<at::Tensor, at::Tensor> lora_forward(const at::Tensor& x, const Base& base,
                                                       const Update& update) {
  static const auto op = LoraForward::find("lora_ext::lora_forward");
  return LoraForward::call(op, x, base, update);
}

inline Gradients lora_backward(const at::Tensor& grad, const at::Tensor& s, WantedOfBase wanted,
                               const c10::List<bool>& wanted_a, const c10::List<bool>& wanted_b,
                               const at::Tensor& x, const Base& base, const Update& update) {
  static const auto op = LoraBackward::find("lora_ext::lora_backward");
  return LoraBackward::call(op, grad, s, wanted, wanted_a, wanted_b, x, base, update);
}

}  // namespace ops
}  // namespace lora_ext
