// Which calls are computed here.
#include "cpu/driver.h"

#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/fused_product.h"

namespace lora_ext::cpu {

// Passes over bfloat16 cannot read float16 adapters, which occur with them only if x and y have
// different half types.
std::string library_reason(at::ScalarType x, at::ScalarType y, int64_t rank) {
  if (x == at::kDouble || y == at::kDouble) return "torch's products compute float64";
  if (kernels_for(dtype_of(x)) == nullptr) return "torch's products were asked for";
  if (rank > kMaxRank) return "rank above " + std::to_string(kMaxRank);
  return is_half(y) && is_half(x) && x != y ? "x and y of two 16-bit dtypes" : "";
}

bool is_batch_invariant(at::ScalarType x, at::ScalarType y, const Update& update) {
  return library_reason(x, y, update.rank()).empty() &&
         std::max(update.in_features(), update.out_features()) <= kMaxPanelDepth &&
         batch_invariant_panel_dtype(dtype_of(x)).has_value();
}

}  // namespace lora_ext::cpu
