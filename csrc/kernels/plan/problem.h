// Inputs of the planner: the card, and the operands of the LoRA linear.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"

namespace lora_ext::plan {

// Properties of a card. `arch` is 10 major + minor.
struct Card {
  int arch;
  int sms;
  int64_t shared_per_sm, shared_per_block;  // bytes; the second is the limit of a block
  std::string name{};       // the driver's, the key of measurements; "" for an abstract card
  bool tensor_maps = true;  // the driver encodes them, which TMA needs
  bool sm90a_code = true;   // this build has sm_90a code
  std::string error{};      // why the CUDA runtime cannot use the card; "" if it can
};

// Many adapters in one batch, each with some rows. The host knows neither the adapter of a row nor
// the rank of an adapter.
struct Groups {
  int64_t count;
  bool indexed = false;  // an index per row; else ends of ranges
  bool listed = false;   // adapters are a list of tensors; else slots of a pool

  auto operator<=>(const Groups&) const = default;
};

// The operands of a LoRA linear. "aligned": unit stride along a row, and pointer and row pitch are
// multiples of 16 bytes.
struct Problem {
  int64_t m, n, k, rank;           // the largest rank, if there are groups
  Dtype dtype = Dtype::kBFloat16;  // of x and y; of two, that which holds both
  bool float_adapters = false;     // else of x's dtype
  bool dropout = false;
  bool given_base = false;       // y is given: there is no weight, and no base product
  bool weight_row_major = true;  // [n, k] with unit stride along k
  bool aligned = true;           // x and y (forward); dY, x and dX (backward)
  bool aligned_weight = true;
  bool aligned_a = true, aligned_b = true;  // without groups
  bool factor_rows = true;                  // A and B have unit stride along a row
  bool backward = false;
  bool need_dx = true, need_dlora_a = true, need_dlora_b = true;  // backward only
  std::optional<Groups> groups{};                                 // else one adapter for all rows

  auto operator<=>(const Problem&) const = default;

  bool half_dtype() const { return is_half(dtype); }  // others stay on the library route
  // lora_gemm computes Y [m, n] of depth k, or dX [m, k] of depth n.
  bool has_product() const { return !backward || need_dx; }
  int64_t columns() const { return backward ? k : n; }
  int64_t depth() const { return backward ? n : k; }
  bool masked_product() const { return backward && dropout; }
  bool need_ds() const { return backward && (need_dx || need_dlora_a); }
  // The largest number of adapters that rows can have.
  int64_t adapters() const { return groups ? std::min(groups->count, m) : 1; }
  // Whether kernels can compute X W^T or dY W: they copy whole chunks of 16 bytes.
  bool kernels_can_make_base() const {
    return !given_base && weight_row_major && aligned && aligned_weight;
  }
};

}  // namespace lora_ext::plan
