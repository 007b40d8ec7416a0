#include "kernels/plan/autotune_cache.h"

#include <atomic>
#include <map>
#include <mutex>

#include "common/nearest.h"

namespace lora_ext::autotune {
namespace {

using Layers = std::map<Layer, ByRows<plan::Request>>;

struct Tables {
  std::mutex mutex;
  std::map<std::string, Layers> by_card;
  std::atomic<uint64_t> version{0};
};
Tables& tables() {
  static Tables all;
  return all;
}

// Grouped calls are not autotuned: the best route depends on the row-to-adapter map. Tensors that
// torch has just allocated are aligned if their rows are whole chunks of 16 bytes.
bool was_measured_so(const plan::Problem& p) {
  const bool all_gradients = p.need_dx && p.need_dlora_a && p.need_dlora_b;
  if (!p.half_dtype() || p.given_base || p.groups || (p.backward && !all_gradients)) return false;
  const int64_t chunk = chunk_elements(p.dtype);
  const int64_t of_adapters = p.float_adapters ? chunk_elements(Dtype::kFloat32) : chunk;
  const bool x = p.k % chunk == 0, y = p.n % chunk == 0;
  return p.weight_row_major && p.factor_rows && p.aligned == (x && y) && p.aligned_weight == x &&
         p.aligned_a == (p.k % of_adapters == 0) && p.aligned_b == (p.rank % of_adapters == 0);
}

}  // namespace

void replace(const std::string& card, const std::vector<Entry>& entries) {
  Layers layers;
  for (const Entry& entry : entries) layers[entry.layer][entry.rows] = entry.request;
  const std::lock_guard lock(tables().mutex);
  tables().by_card[card] = std::move(layers);
  ++tables().version;
}

uint64_t version() { return tables().version; }

plan::Request request_for(const plan::Card& card, const plan::Problem& p, plan::Choice choice,
                          bool reproducible) {
  const plan::Request asked{choice};
  if (choice != plan::Choice::kAuto || reproducible || !was_measured_so(p)) return asked;
  const std::lock_guard lock(tables().mutex);
  const Layers& layers = tables().by_card[card.name];
  const auto by_rows = layers.find({p.backward, p.float_adapters, p.dropout, p.n, p.k, p.rank});
  if (by_rows == layers.end()) return asked;
  const plan::Request* found = nearest(by_rows->second, p.m, 2.0);
  // The fastest route for few rows may not support twice as many.
  const bool fits =
      found != nullptr && (found->tile != plan::Tile::kDecode || p.m <= plan::kMaxDecodeRows);
  return fits ? *found : asked;
}

}  // namespace lora_ext::autotune
