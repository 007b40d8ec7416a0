#include "op/check_parts.h"

#include "op/flatten.h"

namespace lora_ext {
namespace {

bool supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

}  // namespace

void check_supported(const char* op, const char* name, at::ScalarType dtype) {
  EXPECT_TYPE(supported(dtype), "expected ", name,
              " of dtype float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& x) {
  EXPECT(tensor.device() == x.device(), "expected ", name, " on x's device ", x.device(),
         ", but got ", tensor.device(), "; move one of them with .to()");
}

void check_weight(const char* op, const at::Tensor& x, const Base& base) {
  const at::Tensor& weight = base.weight;
  EXPECT(weight.dim() == 2, "expected weight of shape [out_features, in_features], but got ",
         weight.dim(), " dimensions: ", weight.sym_sizes());
  const c10::SymInt in_features = weight.sym_size(1), out_features = weight.sym_size(0);
  EXPECT(x.sym_size(-1) == in_features, "expected x of shape [..., ", in_features, "] for weight ",
         weight.sym_sizes(), ", but got ", x.sym_sizes());
  if (base.bias) {
    EXPECT(base.bias->dim() == 1 && base.bias->sym_size(0) == out_features,
           "expected bias of shape [", out_features, "], but got ", base.bias->sym_sizes());
  }
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

void check_weight_devices(const char* op, const at::Tensor& x, const Base& base) {
  check_same_device(op, "weight", base.weight, x);
  if (base.bias) check_same_device(op, "bias", *base.bias, x);
}

bool is_adapter_dtype(at::ScalarType adapter, at::ScalarType dtype) {
  return adapter == dtype || (is_half(dtype) && adapter == at::kFloat);
}

const char* or_float32(at::ScalarType dtype) { return is_half(dtype) ? " or float32" : ""; }

void check_output(const char* op, const char* name, const at::Tensor& y, const at::Tensor& x,
                  const c10::SymInt& out_features) {
  const std::vector<c10::SymInt> sizes = sym_with_last(x, out_features);
  EXPECT(y.sym_sizes().equals(sizes), "expected ", name, " of shape ", c10::SymIntArrayRef(sizes),
         ", but got ", y.sym_sizes());
  check_supported(op, name, y.scalar_type());
  check_same_device(op, name, y, x);
}

void check_s(const char* op, const at::Tensor& s, const at::Tensor& x, const c10::SymInt& rank) {
  const std::vector<c10::SymInt> s_sizes = {sym_rows(x), rank};
  EXPECT(s.sym_sizes().equals(s_sizes), "expected s of shape ", c10::SymIntArrayRef(s_sizes),
         ", but got ", s.sym_sizes());
  const at::ScalarType sum_dtype = accumulation_dtype(x.scalar_type());
  EXPECT_TYPE(s.scalar_type() == sum_dtype, "expected s of dtype ", sum_dtype, ", but got ",
              s.scalar_type());
  check_same_device(op, "s", s, x);
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

void check_dropout(const char* op, const at::Tensor& x, const DropoutArgs& dropout) {
  check_probability(op, dropout.p);
  check_offsets(op, dropout.row_offset, dropout.col_offset);
  if (dropout.p > 0.0) {
    EXPECT(dropout.seed.has_value(), "expected a seed with dropout_p = ", dropout.p,
           ": an int64 tensor of one element on x's device");
    check_seed(op, *dropout.seed);
    check_same_device(op, "seed", *dropout.seed, x);
  }
}

}  // namespace lora_ext
