// The dtypes of tensors, for code that includes nothing of torch.
#pragma once

#include <cstdint>

namespace lora_ext {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kBool };

constexpr bool is_half(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
}

// In bytes.
constexpr int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16:
      return 2;
    case Dtype::kBool:
      return 1;
  }
  return 0;
}

// In the 16 bytes that kernels copy at a time.
constexpr int64_t chunk_elements(Dtype dtype) { return 16 / element_size(dtype); }

}  // namespace lora_ext
