#include "cpu/panel_choice.h"

#include <ATen/Context.h>

#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <utility>

#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/fused_product.h"

namespace lora_ext::cpu {
namespace {

using Key = std::tuple<Dtype, int64_t, int64_t, bool>;

struct Table {
  std::shared_mutex mutex;
  std::map<Key, MeasuredPanels> kinds;
  std::atomic<bool> is_empty{true};  // most processes measure nothing
};

Table& table() {
  static Table found;
  return found;
}

Key key_of(const ProductKind& kind) { return {kind.dtype, kind.depth, kind.cols, kind.transposed}; }

// nullopt: the rule holds.
std::optional<std::optional<Dtype>> measured_panel(const ProductKind& kind, int64_t rows) {
  Table& all = table();
  if (all.is_empty || !panels_are_auto() || at::globalContext().deterministicAlgorithms())
    return {};
  const std::shared_lock<std::shared_mutex> lock(all.mutex);
  const auto found = all.kinds.find(key_of(kind));
  if (found == all.kinds.end()) return {};
  const std::optional<Dtype> panel = *nearest(found->second, rows);
  // torch.backends.mkldnn may be off now.
  if (panel && !has_panels_of(*panel, kind.dtype)) return {};
  return panel;
}

}  // namespace

std::vector<Dtype> panel_candidates(Dtype dtype) {
  std::vector<Dtype> found;
  for (const Dtype panel : {Dtype::kFloat32, Dtype::kBFloat16}) {
    if (has_panels_of(panel, dtype)) found.push_back(panel);
  }
  return found;
}

void set_measured_panels(const ProductKind& kind, MeasuredPanels measured) {
  Table& all = table();
  const std::unique_lock<std::shared_mutex> lock(all.mutex);
  if (measured.empty()) {
    all.kinds.erase(key_of(kind));
  } else {
    all.kinds[key_of(kind)] = std::move(measured);
  }
  all.is_empty = all.kinds.empty();
}

std::optional<Dtype> faster_panel(const ProductKind& kind, int64_t rows) {
  if (kind.depth > kMaxPanelDepth) return {};
  if (const auto measured = measured_panel(kind, rows)) return *measured;
  const std::optional<Dtype> panel = panel_dtype(kind.dtype);
  const bool is_copied = panel && *panel != kind.dtype && !kind.transposed;
  const TileWalk* walk = panel && panels_are_auto() ? tile_walk(*panel) : nullptr;
  if (walk != nullptr && kind.depth > walk->most_depth) return {};
  const int64_t least = walk == nullptr ? kMinPanelRows : walk->least_rows;
  return is_copied || rows >= least ? panel : std::nullopt;
}

}  // namespace lora_ext::cpu
