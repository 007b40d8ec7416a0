// What lora_linear accepts. Works on real and on symbolic shapes, so Meta and eager share it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora_ext {

// Shapes, dtypes, devices and numbers of one call; throws with tensor, expected and got.
void check_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                   const at::Tensor& lora_b, const std::optional<at::Tensor>& bias, double scaling,
                   double dropout_p, const std::optional<at::Tensor>& seed, bool cast_weight);

}  // namespace lora_ext
