// The ops of many adapters as calls through the dispatcher, in the way of ops.h.
#pragma once

#include <tuple>

#include "op/grouped_flat.h"

namespace lora_ext::ops {

at::Tensor lora_linear_grouped(const at::Tensor& x, const Base& base, const GroupedUpdate& update);

// (y [..., N], s)
std::tuple<at::Tensor, at::Tensor> lora_linear_grouped_forward(const at::Tensor& x,
                                                               const Base& base,
                                                               const GroupedUpdate& update);

flat::GroupedGradients lora_linear_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                    const Base& base, const GroupedUpdate& update,
                                                    const at::Tensor& s,
                                                    const flat::GroupedWanted& wanted);

at::Tensor lora_update_grouped(const at::Tensor& y, const at::Tensor& x,
                               const GroupedUpdate& update);

// (y + the updates [..., N], s)
std::tuple<at::Tensor, at::Tensor> lora_update_grouped_forward(const at::Tensor& y,
                                                               const at::Tensor& x,
                                                               const GroupedUpdate& update);

flat::LoraUpdateGradients lora_update_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const GroupedUpdate& update,
                                                       const at::Tensor& s,
                                                       const flat::GroupedWanted& wanted);

}  // namespace lora_ext::ops
