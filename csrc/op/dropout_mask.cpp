// lora_ext::dropout_mask: the mask that a LoRA linear draws, as a separate op.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/device.h"
#include "op/checks.h"
#include "op/library/library_route.h"

namespace lora_ext {
namespace {

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, c10::SymInt row_offset, c10::SymInt col_offset) {
  check_dropout_mask(seed, rows, cols, dropout_p, row_offset, col_offset);
  return at::empty_symint({rows, cols}, seed.options().dtype(at::kBool));
}

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p,
                        int64_t row_offset, int64_t col_offset) {
  at::Tensor mask = dropout_mask_meta(seed, rows, cols, dropout_p, row_offset, col_offset);
  fill_dropout_mask(mask, {dropout_p, seed, row_offset, col_offset});
  return mask;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "dropout_mask(Tensor seed, SymInt rows, SymInt cols, float dropout_p, SymInt row_offset=0, "
      "SymInt col_offset=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("dropout_mask", TORCH_FN(dropout_mask)); }

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (cuda::is_built()) m.impl("dropout_mask", TORCH_FN(dropout_mask));
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("dropout_mask", TORCH_FN(dropout_mask_meta)); }

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("dropout_mask", torch::CppFunction::makeFallthrough());
}

}  // namespace lora_ext
