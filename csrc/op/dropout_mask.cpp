// The mask that a LoRA linear draws, as separate ops: dropout_mask is the mask itself, drop_rows
// applies it to rows that are not where their masks are, such as those of a mixture's experts.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/check.h"
#include "kernels/device.h"
#include "op/checks.h"
#include "op/library/library_route.h"

namespace lora_ext {
namespace {

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, c10::SymInt row_offset, c10::SymInt col_offset) {
  check_dropout_mask("dropout_mask", seed, rows, cols, dropout_p, row_offset, col_offset);
  return at::empty_symint({rows, cols}, seed.options().dtype(at::kBool));
}

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p,
                        int64_t row_offset, int64_t col_offset) {
  at::Tensor mask = dropout_mask_meta(seed, rows, cols, dropout_p, row_offset, col_offset);
  fill_dropout_mask(mask, {dropout_p, seed, row_offset, col_offset});
  return mask;
}

void drop_rows(at::Tensor& x, const at::Tensor& rows, const at::Tensor& seed, double dropout_p) {
  const char* op = "drop_rows";
  EXPECT(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
         "expected x of shape [rows, columns], contiguous along its columns, but got ", x.sizes());
  check_supported(op, "x", x.scalar_type());
  EXPECT(rows.scalar_type() == at::kLong && rows.dim() == 1 && rows.is_contiguous() &&
             rows.size(0) == x.size(0),
         "expected the mask's row of each of ", x.size(0), " rows, as int64, but got ",
         rows.scalar_type(), " of ", rows.sizes());
  check_dropout_mask(op, seed, x.size(0), x.size(1), dropout_p);
  EXPECT(rows.device() == x.device() && seed.device() == x.device(),
         "expected rows and seed on x's device ", x.device(), ", but got ", rows.device(), " and ",
         seed.device());
  drop_rows_(x, rows, {dropout_p, seed});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "dropout_mask(Tensor seed, SymInt rows, SymInt cols, float dropout_p, SymInt row_offset=0, "
      "SymInt col_offset=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // In place: sets to zero what the mask drops, without scaling what it keeps. Row m of x has the
  // mask's row rows[m]. Not differentiable.
  m.def("drop_rows(Tensor(a!) x, Tensor rows, Tensor seed, float dropout_p) -> ()");
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("dropout_mask", TORCH_FN(dropout_mask));
  m.impl("drop_rows", TORCH_FN(drop_rows));
}

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (!cuda::is_built()) return;
  m.impl("dropout_mask", TORCH_FN(dropout_mask));
  m.impl("drop_rows", TORCH_FN(drop_rows));
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("dropout_mask", TORCH_FN(dropout_mask_meta)); }

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("dropout_mask", torch::CppFunction::makeFallthrough());
}

}  // namespace lora_ext
