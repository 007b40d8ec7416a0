// What the Meta kernels return: shape and dtype without data.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace lora_ext {

inline at::Tensor unfilled(c10::SymIntArrayRef sizes, const at::Tensor& like,
                           at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

inline at::Tensor unfilled_like(const at::Tensor& tensor) {
  return unfilled(tensor.sym_sizes(), tensor, tensor.scalar_type());
}

}  // namespace lora_ext
