// From the shapes of a call, [..., C], to the 2-D tensors of the routes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

namespace lora_ext {

// [..., C] as [M, C] with unit stride in C; a view wherever the strides allow it.
inline at::Tensor flattened(const at::Tensor& tensor) {
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const at::Tensor flat = tensor.reshape({rows, tensor.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

inline std::vector<int64_t> with_last(const at::Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Autocast is decided once, by autocast.cpp; inside, no ATen call may cast again. A backward that
// runs inside `with torch.autocast` would otherwise round float32 adapters.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace lora_ext
