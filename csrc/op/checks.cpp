#include "op/checks.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

#include "common/bounds.h"
#include "op/flatten.h"

namespace lora_ext {
namespace {

bool supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// The functions below say for which op, of Python's name, they refuse.
#define EXPECT(condition, ...) TORCH_CHECK(condition, "lora_ext.", op, ": ", __VA_ARGS__)
#define EXPECT_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, "lora_ext.", op, ": ", __VA_ARGS__)

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& x) {
  EXPECT(tensor.device() == x.device(), "expected ", name, " on x's device ", x.device(),
         ", but got ", tensor.device(), "; move one of them with .to()");
}

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
  const at::Tensor &weight = base.weight, &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(weight.dim() == 2, "expected weight of shape [out_features, in_features], but got ",
         weight.dim(), " dimensions: ", weight.sym_sizes());
  const c10::SymInt in_features = weight.sym_size(1), out_features = weight.sym_size(0);
  EXPECT(x.sym_size(-1) == in_features, "expected x of shape [..., ", in_features, "] for weight ",
         weight.sym_sizes(), ", but got ", x.sym_sizes());
  EXPECT(lora_a.sym_size(1) == in_features, "expected lora_a of shape [rank, ", in_features,
         "] for weight ", weight.sym_sizes(), ", but got ", lora_a.sym_sizes());
  check_rank(op, lora_a, "; call torch.nn.functional.linear where there is no adapter");
  const c10::SymInt rank = lora_a.sym_size(0);
  EXPECT(lora_b.sym_size(0) == out_features && lora_b.sym_size(1) == rank,
         "expected lora_b of shape [", out_features, ", ", rank, "] for weight ",
         weight.sym_sizes(), " and lora_a ", lora_a.sym_sizes(), ", but got ", lora_b.sym_sizes());
  if (base.bias) {
    EXPECT(base.bias->dim() == 1 && base.bias->sym_size(0) == out_features,
           "expected bias of shape [", out_features, "], but got ", base.bias->sym_sizes());
  }
}

void check_update_shapes(const char* op, const at::Tensor& x, const Update& update) {
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(x.sym_size(-1) == lora_a.sym_size(1), "expected x of shape [..., ", lora_a.sym_size(1),
         "] for lora_a ", lora_a.sym_sizes(), ", but got ", x.sym_sizes());
  check_rank(op, lora_a, "; y is the result where there is no adapter");
  EXPECT(lora_b.sym_size(1) == lora_a.sym_size(0), "expected lora_b of shape [out_features, ",
         lora_a.sym_size(0), "] for lora_a ", lora_a.sym_sizes(), ", but got ", lora_b.sym_sizes());
}

// y or its gradient.
void check_output_shape(const char* op, const char* name, const at::Tensor& y, const at::Tensor& x,
                        const Update& update) {
  const std::vector<c10::SymInt> sizes = sym_with_last(x, update.lora_b.sym_size(0));
  EXPECT(y.sym_sizes().equals(sizes), "expected ", name, " of shape ", c10::SymIntArrayRef(sizes),
         ", but got ", y.sym_sizes());
}

void check_weight_dtypes(const char* op, at::ScalarType dtype, const Base& base) {
  const bool casts = base.cast_weight;
  const at::ScalarType weight = base.weight.scalar_type();
  EXPECT_TYPE(weight == dtype || (casts && supported(weight)), "expected weight of x's dtype ",
              dtype, ", but got ", weight, "; cast one of them, or run under torch.autocast");
  if (!base.bias) return;
  const at::ScalarType bias = base.bias->scalar_type();
  EXPECT_TYPE(bias == dtype || bias == at::kFloat || (casts && supported(bias)),
              "expected bias of x's dtype ", dtype, " or float32, but got ", bias);
}

void check_supported(const char* op, const char* name, at::ScalarType dtype) {
  EXPECT_TYPE(supported(dtype), "expected ", name,
              " of dtype float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_adapter_dtypes(const char* op, at::ScalarType dtype, const Update& update) {
  const at::ScalarType adapter = update.lora_a.scalar_type();
  EXPECT_TYPE(adapter == dtype || (is_half(dtype) && adapter == at::kFloat),
              "expected lora_a of x's dtype ", dtype, is_half(dtype) ? " or float32" : "",
              ", but got ", adapter);
  EXPECT_TYPE(update.lora_b.scalar_type() == adapter, "expected lora_b of lora_a's dtype ", adapter,
              ", but got ", update.lora_b.scalar_type());
}

void check_seed(const char* op, const at::Tensor& seed) {
  EXPECT_TYPE(seed.scalar_type() == at::kLong, "expected seed of dtype int64, but got ",
              seed.scalar_type());
  EXPECT(seed.sym_numel() == 1, "expected seed of one element, but got shape ", seed.sym_sizes());
}

void check_probability(const char* op, double dropout_p) {
  EXPECT(dropout_p >= 0.0 && dropout_p < 1.0, "expected dropout_p in [0, 1), but got ", dropout_p);
}

void check_offsets(const char* op, const c10::SymInt& row_offset, const c10::SymInt& col_offset) {
  EXPECT(row_offset >= 0 && col_offset >= 0, "expected row_offset and col_offset >= 0, but got ",
         row_offset, " and ", col_offset);
  // A group of the mask is numbered in 32 bits, four for each 32 columns.
  EXPECT(col_offset <= int64_t{1} << 34, "expected col_offset <= 2^34, but got ", col_offset);
}

void check_numbers(const char* op, const at::Tensor& x, const Update& update) {
  // The kernels hold it in the dtype in which they sum: float32, or float64 for float64.
  const double largest = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                        : std::numeric_limits<float>::max();
  EXPECT(std::abs(update.scaling) <= largest, "expected a finite scaling of at most ", largest,
         " in magnitude, but got ", update.scaling);
  const DropoutArgs& dropout = update.dropout;
  check_probability(op, dropout.p);
  check_offsets(op, dropout.row_offset, dropout.col_offset);
  if (dropout.p > 0.0) {
    EXPECT(dropout.seed.has_value(), "expected a seed with dropout_p = ", dropout.p,
           ": an int64 tensor of one element on x's device");
    check_seed(op, *dropout.seed);
    check_same_device(op, "seed", *dropout.seed, x);
  }
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
  if (!base.is_given()) check_same_device(op, "weight", base.weight, x);
  check_same_device(op, "lora_a", update.lora_a, x);
  check_same_device(op, "lora_b", update.lora_b, x);
  if (base.bias) check_same_device(op, "bias", *base.bias, x);
  check_numbers(op, x, update);
}

// y of a given base, or the gradient of it.
void check_given(const char* op, const char* name, const at::Tensor& y, const at::Tensor& x,
                 const Update& update) {
  check_output_shape(op, name, y, x, update);
  check_supported(op, name, y.scalar_type());
  check_same_device(op, name, y, x);
}

}  // namespace

void check_forward(const at::Tensor& x, const Base& base, const Update& update) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  if (base.is_given()) check_given(op, "y", base.y, x, update);
}

void check_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                    const Update& update, const at::Tensor& s) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  check_given(op, "grad", grad, x, update);
  const std::vector<c10::SymInt> s_sizes = {sym_rows(x), update.lora_a.sym_size(0)};
  EXPECT(s.sym_sizes().equals(s_sizes), "expected s of shape ", c10::SymIntArrayRef(s_sizes),
         ", but got ", s.sym_sizes());
  const at::ScalarType sum_dtype = accumulation_dtype(x.scalar_type());
  EXPECT_TYPE(s.scalar_type() == sum_dtype, "expected s of dtype ", sum_dtype, ", but got ",
              s.scalar_type());
  check_same_device(op, "s", s, x);
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
