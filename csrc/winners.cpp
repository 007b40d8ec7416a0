#include "winners.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace lora_ext::winners {
namespace {

using ByRows = std::map<int64_t, plan::Request>;

struct Tables {
  std::mutex mutex;
  std::map<std::string, std::map<Layer, ByRows>> by_card;
};
Tables& tables() {
  static Tables all;
  return all;
}

bool was_measured_so(const plan::Problem& p, bool backward) {
  const bool aligned = p.aligned && p.aligned_weight && p.aligned_a && p.aligned_b;
  const bool all_gradients = p.need_dx && p.need_dlora_a && p.need_dlora_b;
  return p.half_dtype && p.weight_row_major && aligned && (all_gradients || !backward);
}

double distance(int64_t one, int64_t other) {
  return static_cast<double>(std::max(one, other)) / static_cast<double>(std::min(one, other));
}

const plan::Request* nearest(const ByRows& by_rows, int64_t rows) {
  const plan::Request* found = nullptr;
  double least = 2.0;
  for (const auto& [measured, request] : by_rows) {
    if (distance(measured, rows) > least) continue;
    least = distance(measured, rows);
    found = &request;
  }
  return found;
}

}  // namespace

void replace(const std::string& card, const std::vector<Winner>& winners) {
  std::map<Layer, ByRows> layers;
  for (const Winner& winner : winners) layers[winner.layer][winner.rows] = winner.request;
  const std::lock_guard lock(tables().mutex);
  tables().by_card[card] = std::move(layers);
}

plan::Request request_for(const plan::Card& card, const plan::Problem& p, bool backward,
                          plan::Choice choice) {
  const plan::Request asked{choice};
  if (choice != plan::Choice::kAuto || !was_measured_so(p, backward)) return asked;
  const std::lock_guard lock(tables().mutex);
  const auto layers = tables().by_card.find(card.name);
  if (layers == tables().by_card.end()) return asked;
  const auto by_rows =
      layers->second.find({backward, p.float_adapters, p.dropout, p.n, p.k, p.rank});
  if (by_rows == layers->second.end()) return asked;
  const plan::Request* found = nearest(by_rows->second, p.m);
  return found == nullptr ? asked : *found;
}

}  // namespace lora_ext::winners
