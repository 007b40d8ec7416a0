// From the shapes of a call, [..., C], to the 2-D tensors of the routes; for symbolic shapes, to
// the sizes of these tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

#include "common/call.h"

namespace lora_ext {

// [..., C] as [M, C] with unit stride in C; a view wherever the strides allow it.
inline at::Tensor flattened(const at::Tensor& tensor) {
  if (tensor.dim() == 2 && tensor.stride(1) == 1) return tensor;  // a reshape takes 0.3 us
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const at::Tensor flat = tensor.reshape({rows, tensor.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

inline std::vector<int64_t> with_last(const at::Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = last;
  return sizes;
}

inline std::vector<c10::SymInt> sym_with_last(const at::Tensor& tensor, const c10::SymInt& last) {
  std::vector<c10::SymInt> sizes = tensor.sym_sizes().vec();
  sizes.back() = last;
  return sizes;
}

// M of a tensor of shape [..., C].
inline c10::SymInt sym_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) rows = rows * tensor.sym_size(dim);
  return rows;
}

// Autocast is decided once, by autocast.cpp; inside, no ATen call may cast again. A backward that
// runs inside `with torch.autocast` would otherwise round float32 adapters.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace lora_ext
