// The autotune cache: which route was fastest on a card, for the shapes that were timed there
// (`lora_ext.warmup`). The planner looks here before it uses its prediction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/plan/plan.h"

namespace lora_ext::autotune {

// The key of a measurement, without the number of rows. bfloat16 and float16 run the same kernels.
struct Layer {
  bool backward, float_adapters, dropout;
  int64_t n, k, rank;
  auto operator<=>(const Layer&) const = default;
};

struct Entry {
  Layer layer;
  int64_t rows;
  plan::Request request;
};

// Replaces all entries of a card. The name is the driver's.
void replace(const std::string& card, const std::vector<Entry>& entries);
// Number of replacements so far: plans made before the last one are no longer valid.
uint64_t version();

// Returns the user's request, unless that is kAuto, the choice need not be the same in every run,
// and the card has an entry for the layer with half to twice the rows: the nearest. Entries are for
// operands as torch allocates them and for all gradients.
plan::Request request_for(const plan::Card& card, const plan::Problem& problem, plan::Choice choice,
                          bool reproducible);

}  // namespace lora_ext::autotune
