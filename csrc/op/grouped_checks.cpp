#include "op/grouped_checks.h"

#include <limits>
#include <string>

#include "common/bounds.h"
#include "op/check_parts.h"
#include "op/flatten.h"

namespace lora_ext {
namespace {

std::string name_of(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// Dimensions, dtypes and devices of every factor, before anything is read from their shapes.
void check_each(const char* op, const char* list, const std::vector<at::Tensor>& factors,
                int64_t dims, const at::Tensor& x, at::ScalarType adapter) {
  for (size_t i = 0; i < factors.size(); ++i) {
    const at::Tensor& factor = factors[i];
    EXPECT(factor.dim() == dims, "expected ", name_of(list, i), " of ", dims,
           dims == 2 ? " dimensions, as in a list" : " dimensions, as in a pool", ", but got ",
           factor.dim(), ": ", factor.sym_sizes());
    EXPECT_TYPE(factor.scalar_type() == adapter, "expected ", name_of(list, i),
                " of lora_a[0]'s dtype ", adapter, ", but got ", factor.scalar_type());
    if (factor.device() != x.device()) {
      check_same_device(op, name_of(list, i).c_str(), factor, x);
    }
  }
}

void check_rank(const char* op, const std::string& name, const c10::SymInt& rank) {
  EXPECT(rank >= 1 && rank <= kMaxRank, "expected a rank from 1 to ", kMaxRank, ", but got rank ",
         rank, " from ", name, rank == 0 ? "; give rows without an adapter the index -1" : "");
}

// in_features and out_features are those of the first pair.
void check_pair(const char* op, const at::Tensor& a, const at::Tensor& b, size_t i,
                const c10::SymInt& in_features, const c10::SymInt& out_features) {
  const c10::SymInt rank = a.sym_size(0);
  if (a.sym_size(1) == in_features && b.sym_size(0) == out_features && b.sym_size(1) == rank &&
      rank >= 1 && rank <= kMaxRank) {
    return;
  }
  const std::string name_a = name_of("lora_a", i), name_b = name_of("lora_b", i);
  check_rank(op, name_a, rank);
  EXPECT(a.sym_size(1) == in_features, "expected ", name_a, " of shape [rank, ", in_features,
         "], but got ", a.sym_sizes());
  EXPECT(false, "expected ", name_b, " of shape [", out_features, ", ", rank, "] for ", name_a, " ",
         a.sym_sizes(), ", but got ", b.sym_sizes());
}

void check_pool(const char* op, const at::Tensor& a, const at::Tensor& b) {
  check_rank(op, "a pool lora_a", a.sym_size(1));
  EXPECT(b.sym_size(0) == a.sym_size(0) && b.sym_size(2) == a.sym_size(1),
         "expected a pool lora_b of shape [", a.sym_size(0), ", out_features, ", a.sym_size(1),
         "] for lora_a ", a.sym_sizes(), ", but got ", b.sym_sizes());
}

void check_int32(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  EXPECT_TYPE(tensor.scalar_type() == at::kInt, "expected ", name, " of dtype int32, but got ",
              tensor.scalar_type(), "; convert it with .to(torch.int32)");
  check_same_device(op, name, tensor, x);
}

void check_one_per_adapter(const char* op, const char* name, const at::Tensor& tensor,
                           const c10::SymInt& adapters) {
  EXPECT(tensor.dim() == 1 && tensor.sym_size(0) == adapters, "expected ", name, " of shape [",
         adapters, "], one for each adapter, but got ", tensor.sym_sizes());
}

void check_groups(const char* op, const at::Tensor& x, const GroupedUpdate& update) {
  const c10::SymInt adapters = update.sym_adapters(), rows = sym_rows(x);
  EXPECT(update.index.has_value() != update.offs.has_value(),
         "expected an index of adapters for each row, or offs, the ends of their rows, but got ",
         update.index ? "both" : "neither");
  EXPECT(rows <= std::numeric_limits<int32_t>::max(), "expected at most 2^31 - 1 rows, but got ",
         rows);
  if (update.index) {
    check_int32(op, "index", *update.index, x);
    EXPECT(update.index->sym_numel() == rows, "expected an index with one element for each of the ",
           rows, " rows of x ", x.sym_sizes(), ", but got ", update.index->sym_sizes());
  } else {
    check_int32(op, "offs", *update.offs, x);
    check_one_per_adapter(op, "offs", *update.offs, adapters);
  }
  if (update.ranks) {
    EXPECT(update.is_pool(), "expected ranks with a pool alone: those of a list are in its shapes");
    check_int32(op, "ranks", *update.ranks, x);
    check_one_per_adapter(op, "ranks", *update.ranks, adapters);
  }
  const at::ScalarType scaling = update.scaling.scalar_type();
  const bool may_be_double = x.scalar_type() == at::kDouble;
  EXPECT_TYPE(scaling == at::kFloat || (may_be_double && scaling == at::kDouble),
              "expected scaling of dtype float32", may_be_double ? " or float64" : "", ", but got ",
              scaling);
  check_one_per_adapter(op, "scaling", update.scaling, adapters);
  check_same_device(op, "scaling", update.scaling, x);
}

void check_factors(const char* op, const at::Tensor& x, const Base& base,
                   const GroupedUpdate& update) {
  const auto &lora_a = update.lora_a, &lora_b = update.lora_b;
  EXPECT(!lora_a.empty(), "expected at least one adapter, but got an empty list lora_a");
  EXPECT(lora_a.size() == lora_b.size(), "expected as many lora_b as lora_a, ", lora_a.size(),
         ", but got ", lora_b.size());
  const at::ScalarType dtype = x.scalar_type(), adapter = lora_a[0].scalar_type();
  check_supported(op, "x", dtype);
  EXPECT_TYPE(is_adapter_dtype(adapter, dtype), "expected lora_a of x's dtype ", dtype,
              or_float32(dtype), ", but got ", adapter);
  const int64_t dims = update.is_pool() ? 3 : 2;
  check_each(op, "lora_a", lora_a, dims, x, adapter);
  check_each(op, "lora_b", lora_b, dims, x, adapter);
  const c10::SymInt in_features = lora_a[0].sym_size(-1), out_features = lora_b[0].sym_size(-2);
  EXPECT(x.sym_size(-1) == in_features, "expected x of shape [..., ", in_features, "] for lora_a ",
         lora_a[0].sym_sizes(), ", but got ", x.sym_sizes());
  if (!base.is_given()) {
    EXPECT(out_features == base.weight.sym_size(0), "expected lora_b with ",
           base.weight.sym_size(0), " out_features for weight ", base.weight.sym_sizes(),
           ", but got ", lora_b[0].sym_sizes());
  }
  if (update.is_pool()) return check_pool(op, lora_a[0], lora_b[0]);
  for (size_t i = 0; i < lora_a.size(); ++i) {
    check_pair(op, lora_a[i], lora_b[i], i, in_features, out_features);
  }
}

void check_operands(const char* op, const at::Tensor& x, const Base& base,
                    const GroupedUpdate& update) {
  EXPECT(x.dim() >= 1, "expected x of shape [..., in_features], but got a 0-d tensor");
  if (!base.is_given()) check_weight(op, x, base);
  check_factors(op, x, base, update);
  if (!base.is_given()) {
    check_weight_dtypes(op, x.scalar_type(), base);
    check_weight_devices(op, x, base);
  }
  check_groups(op, x, update);
  check_dropout(op, x, update.dropout);
}

}  // namespace

void check_grouped_forward(const at::Tensor& x, const Base& base, const GroupedUpdate& update) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  if (base.is_given()) check_output(op, "y", base.y, x, update.lora_b[0].sym_size(-2));
}

void check_grouped_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                            const GroupedUpdate& update, const at::Tensor& s, size_t wanted_a,
                            size_t wanted_b) {
  const char* op = base.op();
  check_operands(op, x, base, update);
  check_output(op, "grad", grad, x, update.lora_b[0].sym_size(-2));
  check_s(op, s, x, update.sym_max_rank());
  EXPECT(wanted_a == update.lora_a.size() && wanted_b == update.lora_b.size(),
         "expected a wish for each of the ", update.lora_a.size(), " factors, but got ", wanted_a,
         " and ", wanted_b);
}

}  // namespace lora_ext
