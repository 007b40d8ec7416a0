// Which products are computed by panels: by a rule of processor and rows, or as measured in this
// process (lora_ext.warmup).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/dtype.h"
#include "common/nearest.h"

namespace lora_ext::cpu {

// P Q with P of this dtype, [rows, depth], and Q [depth, cols]; transposed: Q is a transposed matrix,
// as the weight is in a forward.
struct ProductKind {
  Dtype dtype;
  int64_t depth, cols;
  bool transposed;
};

using MeasuredPanels = ByRows<std::optional<Dtype>>;  // nullopt: torch's product is faster

// With fewer rows the library's product is faster, since it packs nothing: at 8 rows of 1024 x 1024
// and 4096 x 4096 panels took 0.97 to 1.14 of its time, at 16 rows 0.80. Halves that are converted
// and not transposed took 0.97 to 1.06 even with one row: the base's product alone, then passes.
constexpr int64_t kMinPanelRows = 8;

// The dtype of the panels if they are the faster way to P Q, with this number of rows for each Q.
std::optional<Dtype> faster_panel(const ProductKind& kind, int64_t rows);

// The dtypes of panels with which a P of this dtype can be multiplied here.
std::vector<Dtype> panel_candidates(Dtype dtype);

// Replaces what was measured of a kind: later products take the choice of the measured number of rows
// that is nearest by its ratio, unless panels were asked for by name, or
// torch.use_deterministic_algorithms is on. Nothing measured: the rule holds again.
void set_measured_panels(const ProductKind& kind, MeasuredPanels measured);

}  // namespace lora_ext::cpu
