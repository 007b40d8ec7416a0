// What a call should cost on a card, and with that the planner's choice where nothing was measured.
// Pure host code: equal problems on equal cards have equal predictions. No GPU has confirmed one.
//
//     launch      the longer of its products, at the rate of the library's large products, and of
//                 its bytes, at the rate of a large copy; and the gap to the next launch
//     lora_gemm   whole waves of tiles, each a little deeper than k by its epilogue, at the share
//                 of that rate which its main loop reaches, as counted from its machine code
//
// benchmarks/gpu/predicted.py puts these beside measurements of a card.
#pragma once

#include <array>
#include <cstdint>

#include "plan/plan.h"

namespace lora_ext::plan {

// How far a prediction may be off. Our own base product is taken where it leads by more.
constexpr double kPredictionError = 0.10;
// With fewer rows than half of a tile, most of its products would be of zeros.
constexpr int64_t kFewestRows = 64;

// A kernel, or a call of the library. `flop` counts what idle SMs could have done meanwhile, and is
// divided by the share of the library's rate that the kernel reaches. `times`: it comes in so many
// parts, a launch each.
struct Launch {
  const char* name;
  double bytes, flop;
  int64_t times = 1;
};

// Those of one call, in order; without a heap, since every new call is planned.
class Launches {
 public:
  void add(const char* name, double bytes, double flop = 0.0, int64_t times = 1) {
    add({name, bytes, flop, times});
  }
  void add(const Launch& launch) { launches_[count_++] = launch; }
  const Launch* begin() const { return launches_.data(); }
  const Launch* end() const { return launches_.data() + count_; }

 private:
  std::array<Launch, 16> launches_{};
  int count_ = 0;
};

// lora_gemm's tiles over Y or dX: flop as in Launch.
double tiles_flop(const Card& card, const TileFacts& tile, const Problem& problem);

// The launches of a plan, on whichever route; of many adapters those that one adapter has, too.
Launches launches_of(const Card& card, const Problem& problem, const Plan& plan);
double predicted_us(const Card& card, const Problem& problem, const Plan& plan);

}  // namespace lora_ext::plan
