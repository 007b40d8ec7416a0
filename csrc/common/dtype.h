// The dtypes of tensors, for code that includes nothing of torch.
#pragma once

#include <cstdint>

namespace lora_ext {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kBool };
constexpr int64_t kElementSizes[] = {8, 4, 2, 2, 1};  // in bytes, in that order

constexpr bool is_half(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
}

constexpr int64_t element_size(Dtype dtype) { return kElementSizes[static_cast<int>(dtype)]; }

// In the 16 bytes that kernels copy at a time.
constexpr int64_t chunk_elements(Dtype dtype) { return 16 / element_size(dtype); }

// What the checks of the kernels know of a dtype of theirs: the relative error of one rounding; what
// is lost of a float that is stored as two numbers, and the scale of the second of them
// (kernels/tile/halves.h).
struct KernelDtype {
  Dtype dtype;
  const char* name;
  double rounding, of_two, lo_scale;
};
// In float16 the second half of a number below 2^-3 is subnormal: 2^-25 is lost, not u^2.
constexpr KernelDtype kKernelDtypes[] = {{Dtype::kBFloat16, "bfloat16", 0x1p-8, 0x1p-16, 1},
                                         {Dtype::kFloat16, "float16", 0x1p-11, 0x1p-19, 2048}};
// The entry of a dtype that is in the table.
constexpr const KernelDtype& kernel_dtype(Dtype dtype) {
  const KernelDtype* found = kKernelDtypes;
  while (found->dtype != dtype) ++found;
  return *found;
}

}  // namespace lora_ext
