#include "op/checks.h"

#include <cmath>
#include <limits>

#include "common/bounds.h"
#include "op/check_parts.h"
#include "op/flatten.h"

namespace lora_ext {
namespace {

void check_factors(const char* op, const at::Tensor& x, const Update& update) {
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(x.dim() >= 1, "expected x of shape [..., in_features], but got a 0-d tensor");
  EXPECT(lora_a.dim() == 2, "expected lora_a of shape [rank, in_features], but got ", lora_a.dim(),
         " dimensions: ", lora_a.sym_sizes());
  EXPECT(lora_b.dim() == 2, "expected lora_b of shape [out_features, rank], but got ", lora_b.dim(),
         " dimensions: ", lora_b.sym_sizes());
}

// without: what to do where there is no adapter.
void check_rank(const char* op, const at::Tensor& lora_a, const char* without) {
  const c10::SymInt rank = lora_a.sym_size(0);
  EXPECT(rank >= 1 && rank <= kMaxRank, "expected a rank from 1 to ", kMaxRank, ", but got rank ",
         rank, " from lora_a ", lora_a.sym_sizes(), rank == 0 ? without : "");
}

void check_weight_shapes(const char* op, const at::Tensor& x, const Base& base,
                         const Update& update) {
  check_weight(op, x, base);
  const at::Tensor &weight = base.weight, &lora_a = update.lora_a, &lora_b = update.lora_b;
  const c10::SymInt in_features = weight.sym_size(1), out_features = weight.sym_size(0);
  EXPECT(lora_a.sym_size(1) == in_features, "expected lora_a of shape [rank, ", in_features,
         "] for weight ", weight.sym_sizes(), ", but got ", lora_a.sym_sizes());
  check_rank(op, lora_a, "; call torch.nn.functional.linear where there is no adapter");
  const c10::SymInt rank = lora_a.sym_size(0);
  EXPECT(lora_b.sym_size(0) == out_features && lora_b.sym_size(1) == rank,
         "expected lora_b of shape [", out_features, ", ", rank, "] for weight ",
         weight.sym_sizes(), " and lora_a ", lora_a.sym_sizes(), ", but got ", lora_b.sym_sizes());
}

void check_update_shapes(const char* op, const at::Tensor& x, const Update& update) {
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(x.sym_size(-1) == lora_a.sym_size(1), "expected x of shape [..., ", lora_a.sym_size(1),
         "] for lora_a ", lora_a.sym_sizes(), ", but got ", x.sym_sizes());
  check_rank(op, lora_a, "; y is the result where there is no adapter");
  EXPECT(lora_b.sym_size(1) == lora_a.sym_size(0), "expected lora_b of shape [out_features, ",
         lora_a.sym_size(0), "] for lora_a ", lora_a.sym_sizes(), ", but got ", lora_b.sym_sizes());
}

void check_adapter_dtypes(const char* op, at::ScalarType dtype, const Update& update) {
  const at::ScalarType adapter = update.lora_a.scalar_type();
  EXPECT_TYPE(is_adapter_dtype(adapter, dtype), "expected lora_a of x's dtype ", dtype,
              or_float32(dtype), ", but got ", adapter);
  EXPECT_TYPE(update.lora_b.scalar_type() == adapter, "expected lora_b of lora_a's dtype ", adapter,
              ", but got ", update.lora_b.scalar_type());
}

void check_numbers(const char* op, const at::Tensor& x, const Update& update) {
  // The kernels hold it in the dtype in which they sum: float32, or float64 for float64.
  const double largest = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                        : std::numeric_limits<float>::max();
  EXPECT(std::abs(update.scaling) <= largest, "expected a finite scaling of at most ", largest,
         " in magnitude, but got ", update.scaling);
  check_dropout(op, x, update.dropout);
}

// All but a given y, of which a backward has only the gradient.
void check_operands(const char* op, const at::Tensor& x, const Base& base, const Update& update) {
  const at::ScalarType dtype = x.scalar_type();
  check_factors(op, x, update);
  if (base.is_given()) {
    check_update_shapes(op, x, update);
  } else {
    check_weight_shapes(op, x, base, update);
  }
  check_supported(op, "x", dtype);
  if (!base.is_given()) check_weight_dtypes(op, dtype, base);
  check_adapter_dtypes(op, dtype, update);
  if (!base.is_given()) check_weight_devices(op, x, base);
  check_same_device(op, "lora_a", update.lora_a, x);
  check_same_device(op, "lora_b", update.lora_b, x);
  check_numbers(op, x, update);
}

}  // namespace

void check_forward(const at::Tensor& x, const Base& base, const Update& update) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  if (base.is_given()) check_output(op, "y", base.y, x, update.lora_b.sym_size(0));
}

void check_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                    const Update& update, const at::Tensor& s) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  check_output(op, "grad", grad, x, update.lora_b.sym_size(0));
  check_s(op, s, x, update.lora_a.sym_size(0));
}

void check_dropout_mask(const at::Tensor& seed, const c10::SymInt& rows, const c10::SymInt& cols,
                        double dropout_p, const c10::SymInt& row_offset,
                        const c10::SymInt& col_offset) {
  constexpr char op[] = "dropout_mask";
  EXPECT(rows >= 0 && cols >= 0, "expected rows and cols >= 0, but got ", rows, " and ", cols);
  check_probability(op, dropout_p);
  check_offsets(op, row_offset, col_offset);
  check_seed(op, seed);
}

}  // namespace lora_ext
