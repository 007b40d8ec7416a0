#include "op/checks.h"

#include <cmath>
#include <limits>

#include "common/bounds.h"
#include "common/check.h"

namespace lora_ext {
namespace {

bool supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

void check_same_device(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  LORA_EXT_CHECK(tensor.device() == x.device(), "expected ", name, " on x's device ", x.device(),
                 ", but got ", tensor.device(), "; move one of them with .to()");
}

void check_shapes(const at::Tensor& x, const Base& base, const Update& update) {
  const at::Tensor &weight = base.weight, &lora_a = update.lora_a, &lora_b = update.lora_b;
  const std::optional<at::Tensor>& bias = base.bias;
  LORA_EXT_CHECK(x.dim() >= 1, "expected x of shape [..., in_features], but got a 0-d tensor");
  LORA_EXT_CHECK(weight.dim() == 2,
                 "expected weight of shape [out_features, in_features], but got ", weight.dim(),
                 " dimensions: ", weight.sym_sizes());
  LORA_EXT_CHECK(lora_a.dim() == 2, "expected lora_a of shape [rank, in_features], but got ",
                 lora_a.dim(), " dimensions: ", lora_a.sym_sizes());
  LORA_EXT_CHECK(lora_b.dim() == 2, "expected lora_b of shape [out_features, rank], but got ",
                 lora_b.dim(), " dimensions: ", lora_b.sym_sizes());
  const c10::SymInt in_features = weight.sym_size(1), out_features = weight.sym_size(0);
  const c10::SymInt rank = lora_a.sym_size(0);
  LORA_EXT_CHECK(x.sym_size(-1) == in_features, "expected x of shape [..., ", in_features,
                 "] for weight ", weight.sym_sizes(), ", but got ", x.sym_sizes());
  LORA_EXT_CHECK(lora_a.sym_size(1) == in_features, "expected lora_a of shape [rank, ", in_features,
                 "] for weight ", weight.sym_sizes(), ", but got ", lora_a.sym_sizes());
  LORA_EXT_CHECK(rank >= 1 && rank <= kMaxRank, "expected a rank from 1 to ", kMaxRank,
                 ", but got rank ", rank, " from lora_a ", lora_a.sym_sizes(),
                 rank == 0 ? "; call torch.nn.functional.linear where there is no adapter" : "");
  LORA_EXT_CHECK(lora_b.sym_size(0) == out_features && lora_b.sym_size(1) == rank,
                 "expected lora_b of shape [", out_features, ", ", rank, "] for weight ",
                 weight.sym_sizes(), " and lora_a ", lora_a.sym_sizes(), ", but got ",
                 lora_b.sym_sizes());
  if (bias) {
    LORA_EXT_CHECK(bias->dim() == 1 && bias->sym_size(0) == out_features,
                   "expected bias of shape [", out_features, "], but got ", bias->sym_sizes());
  }
}

void check_dtypes(const at::Tensor& x, const Base& base, const Update& update) {
  const at::Tensor &weight = base.weight, &lora_a = update.lora_a, &lora_b = update.lora_b;
  const std::optional<at::Tensor>& bias = base.bias;
  const bool cast_weight = base.cast_weight;
  const at::ScalarType dtype = x.scalar_type();
  LORA_EXT_CHECK_TYPE(supported(dtype),
                      "expected x of dtype float64, float32, bfloat16 or float16, but got ", dtype);
  LORA_EXT_CHECK_TYPE(
      weight.scalar_type() == dtype || (cast_weight && supported(weight.scalar_type())),
      "expected weight of x's dtype ", dtype, ", but got ", weight.scalar_type(),
      "; cast one of them, or run under torch.autocast");
  const at::ScalarType adapter = lora_a.scalar_type();
  LORA_EXT_CHECK_TYPE(adapter == dtype || (is_half(dtype) && adapter == at::kFloat),
                      "expected lora_a of x's dtype ", dtype, is_half(dtype) ? " or float32" : "",
                      ", but got ", adapter);
  LORA_EXT_CHECK_TYPE(lora_b.scalar_type() == adapter, "expected lora_b of lora_a's dtype ",
                      adapter, ", but got ", lora_b.scalar_type());
  if (bias) {
    LORA_EXT_CHECK_TYPE(bias->scalar_type() == dtype || bias->scalar_type() == at::kFloat ||
                            (cast_weight && supported(bias->scalar_type())),
                        "expected bias of x's dtype ", dtype, " or float32, but got ",
                        bias->scalar_type());
  }
}

void check_seed(const at::Tensor& seed) {
  LORA_EXT_CHECK_TYPE(seed.scalar_type() == at::kLong, "expected seed of dtype int64, but got ",
                      seed.scalar_type());
  LORA_EXT_CHECK(seed.sym_numel() == 1, "expected seed of one element, but got shape ",
                 seed.sym_sizes());
}

void check_probability(double dropout_p) {
  LORA_EXT_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "expected dropout_p in [0, 1), but got ",
                 dropout_p);
}

void check_offsets(const c10::SymInt& row_offset, const c10::SymInt& col_offset) {
  LORA_EXT_CHECK(row_offset >= 0 && col_offset >= 0,
                 "expected row_offset and col_offset >= 0, but got ", row_offset, " and ",
                 col_offset);
  // A group of the mask is numbered in 32 bits, four for each 32 columns.
  LORA_EXT_CHECK(col_offset <= int64_t{1} << 34, "expected col_offset <= 2^34, but got ",
                 col_offset);
}

}  // namespace

void check_forward(const at::Tensor& x, const Base& base, const Update& update) {
  check_shapes(x, base, update);
  check_dtypes(x, base, update);
  check_same_device("weight", base.weight, x);
  check_same_device("lora_a", update.lora_a, x);
  check_same_device("lora_b", update.lora_b, x);
  if (base.bias) check_same_device("bias", *base.bias, x);
  // The kernels hold it in the dtype in which they sum: float32, or float64 for float64.
  const double largest = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                        : std::numeric_limits<float>::max();
  LORA_EXT_CHECK(std::abs(update.scaling) <= largest, "expected a finite scaling of at most ",
                 largest, " in magnitude, but got ", update.scaling);
  const DropoutArgs& dropout = update.dropout;
  check_probability(dropout.p);
  check_offsets(dropout.row_offset, dropout.col_offset);
  if (dropout.p > 0.0) {
    LORA_EXT_CHECK(dropout.seed.has_value(), "expected a seed with dropout_p = ", dropout.p,
                   ": an int64 tensor of one element on x's device");
    check_seed(*dropout.seed);
    check_same_device("seed", *dropout.seed, x);
  }
}

void check_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                    const Update& update, const at::Tensor& s) {
  check_forward(x, base, update);
  std::vector<c10::SymInt> y_sizes = x.sym_sizes().vec();
  y_sizes.back() = base.weight.sym_size(0);
  LORA_EXT_CHECK(grad.sym_sizes().equals(y_sizes), "expected grad of shape ",
                 c10::SymIntArrayRef(y_sizes), ", but got ", grad.sym_sizes());
  c10::SymInt rows = 1;
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) rows = rows * x.sym_size(dim);
  const std::vector<c10::SymInt> s_sizes = {rows, update.lora_a.sym_size(0)};
  LORA_EXT_CHECK(s.sym_sizes().equals(s_sizes), "expected s of shape ",
                 c10::SymIntArrayRef(s_sizes), ", but got ", s.sym_sizes());
  const at::ScalarType sum_dtype = accumulation_dtype(x.scalar_type());
  LORA_EXT_CHECK_TYPE(s.scalar_type() == sum_dtype, "expected s of dtype ", sum_dtype, ", but got ",
                      s.scalar_type());
  check_same_device("grad", grad, x);
  check_same_device("s", s, x);
}

void check_dropout_mask(const at::Tensor& seed, const c10::SymInt& rows, const c10::SymInt& cols,
                        double dropout_p, const c10::SymInt& row_offset,
                        const c10::SymInt& col_offset) {
  LORA_EXT_CHECK(rows >= 0 && cols >= 0, "expected rows and cols >= 0, but got ", rows, " and ",
                 cols);
  check_probability(dropout_p);
  check_offsets(row_offset, col_offset);
  check_seed(seed);
}

}  // namespace lora_ext
