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

// What a card keeps up: of the library's half product at 4096 x 4096 x 4096; of a copy, read and
// written bytes together; from the end of a kernel to the start of the next, in a graph.
struct Sustained {
  double tflops, dram_gb_s, gap_us;
};
Sustained sustained_by(const Card& card);

// A kernel, or a call of the library. `flop` counts what idle SMs could have done meanwhile, and is
// divided by the share of the library's rate that the kernel reaches. `times`: it comes in so many
// parts, a launch each.
struct Launch {
  const char* name;
  double bytes, flop;
  int64_t times = 1;
};
double microseconds(const Launch& launch, const Sustained& rates);

// Those of one call, in order; without a heap, since every call is planned.
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

// The library's product [m, n] = [m, k] [k, n], which reads what it adds to if it accumulates.
Launch library_product(const Card& card, const char* name, int64_t m, int64_t n, int64_t k,
                       bool accumulate = false);
// What the main loop of a tile of lora_gemm reaches of the rate of the library's, on the card of
// its generation.
double main_loop_share(const Card& card, const TileFacts& tile, bool masked);
// Of lora_gemm's tiles over [m, n] with k of depth: flop as in Launch.
double tiles_flop(const Card& card, const TileFacts& tile, int64_t m, int64_t n, int64_t k,
                  bool masked);

// The launches of a plan, on whichever route.
Launches launches_of(const Card& card, const Problem& problem, const Plan& plan, bool backward);
double predicted_us(const Card& card, const Problem& problem, const Plan& plan, bool backward);

}  // namespace lora_ext::plan
