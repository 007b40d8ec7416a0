#include "op/checks.h"

#include <cmath>
#include <limits>
#include <string>

#include "common/bounds.h"
#include "common/check.h"

namespace lora_ext {
namespace {

bool supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// ---- dtypes and devices ----

void check_same_device(const char* op, const std::string& name, const at::Tensor& tensor,
                       const at::Tensor& x) {
  EXPECT(tensor.device() == x.device(), "expected ", name, " on x's device ", x.device(),
         ", but got ", tensor.device(), "; move one of them with .to()");
}

void check_int32(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  EXPECT_TYPE(tensor.scalar_type() == at::kInt, "expected ", name, " of dtype int32, but got ",
              tensor.scalar_type(), "; convert it with .to(torch.int32)");
  check_same_device(op, name, tensor, x);
}

// ---- the base ----

void check_weight_shapes(const char* op, const at::Tensor& x, const Base& base) {
  const at::Tensor& weight = base.weight;
  EXPECT(!base.y.defined(), "expected a weight or a y, but got both");
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

// A y that is given as the base, or the gradient of y.
void check_output(const char* op, const char* name, const at::Tensor& y, const at::Tensor& x,
                  const c10::SymInt& out_features) {
  const std::vector<c10::SymInt> sizes = sym_with_last(x, out_features);
  EXPECT(y.sym_sizes().equals(sizes), "expected ", name, " of shape ", c10::SymIntArrayRef(sizes),
         ", but got ", y.sym_sizes());
  check_supported(op, name, y.scalar_type());
  check_same_device(op, name, y, x);
}

// ---- the update ----

// The name of a factor in messages: with one adapter it has no number.
std::string name_of(const char* list, const Update& update, size_t i) {
  return update.is_one() ? list : std::string(list) + "[" + std::to_string(i) + "]";
}

// Calls visit(name of the list, factor, its number in the list).
template <class Visit>
void for_factors(const Update& update, const Visit& visit) {
  for (size_t i = 0; i < update.lora_a.size(); ++i) {
    visit("lora_a", update.lora_a[i], i);
    visit("lora_b", update.lora_b[i], i);
  }
}

// Called before anything is read from the shapes.
void check_lists(const char* op, const Update& update) {
  const auto &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(!lora_a.empty(), "expected at least one adapter, but got an empty list lora_a");
  EXPECT(lora_a.size() == lora_b.size(), "expected as many lora_b as lora_a, ", lora_a.size(),
         ", but got ", lora_b.size());
  if (update.is_one()) {
    EXPECT(lora_a[0].dim() == 2, "expected lora_a of shape [rank, in_features], but got ",
           lora_a[0].dim(), " dimensions: ", lora_a[0].sym_sizes());
    EXPECT(lora_b[0].dim() == 2, "expected lora_b of shape [out_features, rank], but got ",
           lora_b[0].dim(), " dimensions: ", lora_b[0].sym_sizes());
    return;
  }
  const int64_t dims = update.is_pool() ? 3 : 2;
  for_factors(update, [&](const char* list, const at::Tensor& factor, size_t i) {
    EXPECT(factor.dim() == dims, "expected ", name_of(list, update, i), " of ", dims,
           dims == 2 ? " dimensions, as in a list" : " dimensions, as in a pool", ", but got ",
           factor.dim(), ": ", factor.sym_sizes());
  });
}

// name: that of lora_a in messages.
void check_rank(const char* op, const std::string& name, const at::Tensor& a,
                const c10::SymInt& rank, const Base& base, const Update& update) {
  const char* without = !update.is_one() ? "; give rows without an adapter the index -1"
                        : base.is_given()
                            ? "; y is the result where there is no adapter"
                            : "; call torch.nn.functional.linear where there is no adapter";
  EXPECT(rank >= 1 && rank <= kMaxRank, "expected a rank from 1 to ", kMaxRank, ", but got rank ",
         rank, " from ", name, " ", a.sym_sizes(), rank == 0 ? without : "");
}

void check_pair(const char* op, const Base& base, const Update& update, size_t i,
                const c10::SymInt& in_features, const c10::SymInt& out_features) {
  const at::Tensor &a = update.lora_a[i], &b = update.lora_b[i];
  const c10::SymInt rank = a.sym_size(0);
  if (a.sym_size(1) == in_features && b.sym_size(0) == out_features && b.sym_size(1) == rank &&
      rank >= 1 && rank <= kMaxRank) {
    return;
  }
  const std::string name_a = name_of("lora_a", update, i), name_b = name_of("lora_b", update, i);
  const std::string of_weight =
      base.is_given() ? "" : c10::str(" for weight ", base.weight.sym_sizes());
  EXPECT(a.sym_size(1) == in_features, "expected ", name_a, " of shape [rank, ", in_features, "]",
         of_weight, ", but got ", a.sym_sizes());
  check_rank(op, name_a, a, rank, base, update);
  EXPECT(false, "expected ", name_b, " of shape [", out_features, ", ", rank, "]",
         of_weight.empty() ? " for " : of_weight + " and ", name_a, " ", a.sym_sizes(),
         ", but got ", b.sym_sizes());
}

void check_pool(const char* op, const Base& base, const Update& update,
                const c10::SymInt& in_features, const c10::SymInt& out_features) {
  const at::Tensor &a = update.lora_a[0], &b = update.lora_b[0];
  EXPECT(a.sym_size(2) == in_features, "expected a pool lora_a of shape [adapters, rank, ",
         in_features, "], but got ", a.sym_sizes());
  check_rank(op, "a pool lora_a", a, a.sym_size(1), base, update);
  EXPECT(b.sym_size(0) == a.sym_size(0) && b.sym_size(1) == out_features &&
             b.sym_size(2) == a.sym_size(1),
         "expected a pool lora_b of shape [", a.sym_size(0), ", ", out_features, ", ",
         a.sym_size(1), "] for lora_a ", a.sym_sizes(), ", but got ", b.sym_sizes());
}

void check_update_shapes(const char* op, const at::Tensor& x, const Base& base,
                         const Update& update) {
  const at::Tensor& a = update.lora_a[0];
  const c10::SymInt in_features = base.is_given() ? a.sym_size(-1) : base.weight.sym_size(1);
  const c10::SymInt out_features =
      base.is_given() ? update.lora_b[0].sym_size(-2) : base.weight.sym_size(0);
  EXPECT(x.sym_size(-1) == in_features, "expected x of shape [..., ", in_features, "] for ",
         name_of("lora_a", update, 0), " ", a.sym_sizes(), ", but got ", x.sym_sizes());
  if (update.is_pool()) return check_pool(op, base, update, in_features, out_features);
  for (size_t i = 0; i < update.lora_a.size(); ++i) {
    check_pair(op, base, update, i, in_features, out_features);
  }
}

void check_update_dtypes(const char* op, at::ScalarType dtype, const Update& update) {
  const at::ScalarType adapter = update.lora_a[0].scalar_type();
  const bool may_be_float = is_half(dtype) && adapter == at::kFloat;
  EXPECT_TYPE(adapter == dtype || may_be_float, "expected lora_a of x's dtype ", dtype,
              is_half(dtype) ? " or float32" : "", ", but got ", adapter);
  for_factors(update, [&](const char* list, const at::Tensor& factor, size_t i) {
    EXPECT_TYPE(factor.scalar_type() == adapter, "expected ", name_of(list, update, i), " of ",
                name_of("lora_a", update, 0), "'s dtype ", adapter, ", but got ",
                factor.scalar_type());
  });
}

void check_grouping(const char* op, const at::Tensor& x, const Update& update) {
  const Grouping& many = *update.grouping;
  const c10::SymInt adapters = update.sym_adapters(), rows = sym_rows(x);
  const auto check_one_per_adapter = [&](const char* name, const at::Tensor& tensor) {
    EXPECT(tensor.dim() == 1 && tensor.sym_size(0) == adapters, "expected ", name, " of shape [",
           adapters, "], one for each adapter, but got ", tensor.sym_sizes());
  };
  EXPECT(many.index.has_value() != many.offs.has_value(),
         "expected an index of adapters for each row, or offs, the ends of their rows, but got ",
         many.index ? "both" : "neither");
  EXPECT(rows <= std::numeric_limits<int32_t>::max(), "expected at most 2^31 - 1 rows, but got ",
         rows);
  if (many.index) {
    check_int32(op, "index", *many.index, x);
    EXPECT(many.index->sym_numel() == rows, "expected an index with one element for each of the ",
           rows, " rows of x ", x.sym_sizes(), ", but got ", many.index->sym_sizes());
  } else {
    check_int32(op, "offs", *many.offs, x);
    check_one_per_adapter("offs", *many.offs);
  }
  if (many.ranks) {
    EXPECT(update.is_pool(), "expected ranks with a pool alone: those of a list are in its shapes");
    check_int32(op, "ranks", *many.ranks, x);
    check_one_per_adapter("ranks", *many.ranks);
  }
  const at::ScalarType scaling = many.scaling.scalar_type();
  const bool may_be_double = x.scalar_type() == at::kDouble;
  EXPECT_TYPE(scaling == at::kFloat || (may_be_double && scaling == at::kDouble),
              "expected scaling of dtype float32", may_be_double ? " or float64" : "", ", but got ",
              scaling);
  check_one_per_adapter("scaling", many.scaling);
  check_same_device(op, "scaling", many.scaling, x);
}

// The kernels hold the scaling in the dtype in which they sum: float32, or float64 for float64.
void check_scaling(const char* op, const at::Tensor& x, double scaling) {
  const double largest = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                        : std::numeric_limits<float>::max();
  EXPECT(std::abs(scaling) <= largest, "expected a finite scaling of at most ", largest,
         " in magnitude, but got ", scaling);
}

// ---- dropout ----

void check_seed(const char* op, const at::Tensor& seed) {
  EXPECT_TYPE(seed.scalar_type() == at::kLong, "expected seed of dtype int64, but got ",
              seed.scalar_type());
  EXPECT(seed.sym_numel() == 1, "expected seed of one element, but got shape ", seed.sym_sizes());
}

void check_numbers(const char* op, double dropout_p, const c10::SymInt& row_offset,
                   const c10::SymInt& col_offset) {
  EXPECT(dropout_p >= 0.0 && dropout_p < 1.0, "expected dropout_p in [0, 1), but got ", dropout_p);
  EXPECT(row_offset >= 0 && col_offset >= 0, "expected row_offset and col_offset >= 0, but got ",
         row_offset, " and ", col_offset);
  // The mask's groups, four for each 32 columns, are numbered in 32 bits.
  EXPECT(col_offset <= int64_t{1} << 34, "expected col_offset <= 2^34, but got ", col_offset);
}

void check_dropout(const char* op, const at::Tensor& x, const DropoutArgs& dropout) {
  check_numbers(op, dropout.p, dropout.row_offset, dropout.col_offset);
  if (dropout.p == 0.0) return;
  EXPECT(dropout.seed.has_value(), "expected a seed with dropout_p = ", dropout.p,
         ": an int64 tensor of one element on x's device");
  check_seed(op, *dropout.seed);
  check_same_device(op, "seed", *dropout.seed, x);
}

// ---- all ----

// Checks all operands except a given y: a backward has only its gradient.
void check_operands(const char* op, const at::Tensor& x, const Base& base, const Update& update) {
  const at::ScalarType dtype = x.scalar_type();
  EXPECT(x.dim() >= 1, "expected x of shape [..., in_features], but got a 0-d tensor");
  check_lists(op, update);
  if (!base.is_given()) check_weight_shapes(op, x, base);
  EXPECT(!base.is_given() || !base.bias, "expected no bias beside a y that is given, but got one");
  check_update_shapes(op, x, base, update);
  check_supported(op, "x", dtype);
  if (!base.is_given()) check_weight_dtypes(op, dtype, base);
  check_update_dtypes(op, dtype, update);
  if (!base.is_given()) {
    check_same_device(op, "weight", base.weight, x);
    if (base.bias) check_same_device(op, "bias", *base.bias, x);
  }
  for_factors(update, [&](const char* list, const at::Tensor& factor, size_t i) {
    if (factor.device() != x.device()) check_same_device(op, name_of(list, update, i), factor, x);
  });
  if (update.is_one()) {
    check_scaling(op, x, update.scaling);
  } else {
    check_grouping(op, x, update);
  }
  check_dropout(op, x, update.dropout);
  EXPECT(base.row_block >= 0, "expected row_block >= 0, but got ", base.row_block);
  EXPECT(!base.is_given() || (!base.packed && !base.packed_t),
         "expected no packed weight beside a y that is given");
}

}  // namespace

void check_supported(const char* op, const char* name, at::ScalarType dtype) {
  EXPECT_TYPE(supported(dtype), "expected ", name,
              " of dtype float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_forward(const at::Tensor& x, const Base& base, const Update& update) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  if (!base.is_given()) return;
  EXPECT(base.y.defined(), "expected a weight or a y, but got neither");
  check_output(op, "y", base.y, x, update.lora_b[0].sym_size(-2));
}

void check_backward(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                    const at::Tensor& x, const Base& base, const Update& update) {
  const char* op = base.op();
  const size_t factors = update.lora_a.size(), of_a = wanted.dlora_a.size();
  const size_t of_b = wanted.dlora_b.size();
  EXPECT(of_a == factors && of_b == factors, "expected a flag for the gradient of each of the ",
         factors, " factors, but got ", of_a, " and ", of_b);
  EXPECT(!wanted.dbias || !base.is_given(),
         "expected no request for the gradient of a bias: a y that is given has none");
  check_operands(op, x, base, update);
  check_output(op, "grad", grad, x, update.lora_b[0].sym_size(-2));
  const std::vector<c10::SymInt> s_sizes = {sym_rows(x), update.sym_rank()};
  EXPECT(s.sym_sizes().equals(s_sizes), "expected s of shape ", c10::SymIntArrayRef(s_sizes),
         ", but got ", s.sym_sizes());
  const at::ScalarType sum_dtype = accumulation_dtype(x.scalar_type());
  EXPECT_TYPE(s.scalar_type() == sum_dtype, "expected s of dtype ", sum_dtype, ", but got ",
              s.scalar_type());
  check_same_device(op, "s", s, x);
}

void check_dropout_mask(const char* op, const at::Tensor& seed, const c10::SymInt& rows,
                        const c10::SymInt& cols, double dropout_p, const c10::SymInt& row_offset,
                        const c10::SymInt& col_offset) {
  EXPECT(rows >= 0 && cols >= 0, "expected rows and cols >= 0, but got ", rows, " and ", cols);
  check_numbers(op, dropout_p, row_offset, col_offset);
  check_seed(op, seed);
}

}  // namespace lora_ext
