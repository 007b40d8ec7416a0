// lora_ext::dropout_mask: the mask that a LoRA linear draws, as a separate op.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/device.h"
#include "op/checks.h"
#include "op/library/dropout.h"

namespace lora_ext {
namespace {

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p,
                        int64_t row_offset, int64_t col_offset) {
  check_dropout_mask(seed, rows, cols, dropout_p, row_offset, col_offset);
  at::Tensor mask = at::empty({rows, cols}, seed.options().dtype(at::kBool));
  fill_dropout_mask(mask, {dropout_p, seed, row_offset, col_offset});
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("dropout_mask", TORCH_FN(dropout_mask)); }

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (cuda::is_built()) m.impl("dropout_mask", TORCH_FN(dropout_mask));
}

}  // namespace lora_ext
