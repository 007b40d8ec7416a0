// What a seed draws for a whole LoRA linear: its operands' types, the card, and the request to the
// planner.
#pragma once
#include <algorithm>
#include <string>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/reference.h"
#include "kernels/plan/plan.h"

namespace kernels {

// 108 SMs give short splits, two give many tiles per block; sm_86 has less shared memory.
inline constexpr int kManySms = 108, kFewSms = 2;
inline plan::Card ampere(int sms) { return {80, sms, 167936, 166912}; }
inline plan::Card small_ampere() { return {86, 16, 102400, 101376}; }
inline plan::Card hopper(int sms) { return {90, sms, 233472, 232448}; }

struct LinearCase {
  int m, n, k, rank;
  Numbers numbers;
  bool float_adapters, dropout, aligned, early;
  plan::Card card;
  plan::Choice choice;
  int64_t clusters;  // of Hopper's kernels that are resident at a time
  float scaling;
  double size_of_a, size_of_b, size_of_dy;  // for real numbers

  bool exact() const { return numbers == Numbers::Integers; }
};

// Families of sizes, by their names: kernels launched with PDL, and many stages over more tiles than
// there are clusters.
inline LinearCase draw_linear_case(const Case& run, Random& random) {
  const auto draw = [&](uint64_t count) { return static_cast<int>(random() % count); };
  const std::string size = run.size.name;
  const bool every_rank = size == "every_rank", laps = size == "laps";
  LinearCase c{};
  c.m = run.size.m, c.n = run.size.n, c.k = run.size.k;
  c.numbers = every_rank || draw(2) ? Numbers::Integers : Numbers::Reals;
  constexpr int kRanks[] = {1, 3, 8, 12, 16, 24, 40, 64, 130};
  c.rank =
      every_rank ? 1 + static_cast<int>((run.seed - 1) % 257) : kRanks[draw(std::size(kRanks))];
  c.float_adapters = every_rank || draw(2);
  c.dropout = draw(2);
  c.aligned = draw(3) != 0;
  const plan::Card cards[] = {ampere(kManySms), ampere(kFewSms), small_ampere(), hopper(132),
                              hopper(4)};
  c.card = cards[draw(std::size(cards))];
  c.choice = draw(2) ? plan::Choice::kKernel : plan::Choice::kHybrid;
  c.early = draw(2);
  c.clusters = 1 + draw(8);
  // Adapters of a fresh layer, and gradients, are small.
  c.size_of_a = 0.02, c.size_of_b = 0.001, c.size_of_dy = 0.01;
  if (size == "early") {
    c.aligned = c.early = true, c.choice = plan::Choice::kKernel;
    c.card = hopper(draw(2) ? 4 : 132);
  }
  if (laps) {
    c.aligned = true, c.clusters = 1 + draw(2);
    c.choice = plan::Choice::kKernel, c.card = hopper(2 << draw(3));
    c.size_of_a = c.size_of_b = c.size_of_dy = 1;  // so that T shows in Y and dX
  }
  c.scaling = c.exact() ? 0.5f : draw(2) ? 1.7f : laps ? 0.6f : 0.013f;
  return c;
}

}  // namespace kernels
