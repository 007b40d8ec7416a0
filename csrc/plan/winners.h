// Measured winners: which route was fastest on a card, for the shapes that were timed there
// (`lora_ext.warmup`). The planner asks here before it goes by its prediction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace lora_ext::winners {

// What was timed, less the number of rows. bfloat16 and float16 run the same kernels.
struct Layer {
  bool backward, float_adapters, dropout;
  int64_t n, k, rank;

  auto operator<=>(const Layer&) const = default;
};

struct Winner {
  Layer layer;
  int64_t rows;
  plan::Request request;
};

// Puts these in place of all that was known of a card. The name is the driver's. Pinned: the user
// has named them, so that they are the same in every run.
void replace(const std::string& card, const std::vector<Winner>& winners, bool pinned);

// How often they have been replaced: what was planned before counts no more.
uint64_t version();

// The request for a problem: the user's, unless that is kAuto and the card has a winner for the
// layer. Where the choice must be reproducible, only pinned winners count. Of several numbers of
// rows the nearest counts, if it is within a factor of 2. Measurements are of operands as torch
// allocates them and of all gradients; other problems have no winner.
plan::Request request_for(const plan::Card& card, const plan::Problem& problem, plan::Choice choice,
                          bool reproducible);

}  // namespace lora_ext::winners
