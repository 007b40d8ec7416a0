// Predicts what a call costs on a card; the planner chooses by that if nothing was measured. Pure
// host code: equal problems on equal cards have equal predictions. No GPU has confirmed one.
//
//     launch      the longer of its products, at the rate of the library's large products, and of
//                 its bytes, at the rate of a large copy; and the gap to the next launch
//     lora_gemm   whole waves of tiles, each a little deeper than k by its epilogue, at the
//                 fraction of that rate which its main loop reaches, as counted from machine code
//
// benchmarks/gpu/predicted.py compares these with measurements on a card.
#pragma once
#include <array>
#include <cstdint>

#include "kernels/plan/plan.h"

namespace lora_ext::plan {

// The error of a prediction. Our own base product is chosen only if it leads by more.
constexpr double kPredictionError = 0.10;
// With fewer rows than half of a tile, most of its products would multiply zeros.
constexpr int64_t kMinRows = 64;

// A kernel, or a call of the library. `flop` includes what idle SMs could have done meanwhile, and
// is divided by the fraction of the library's rate that the kernel reaches. `times`: the number of
// launches that it takes.
struct Launch {
  const char* name;
  double bytes, flop;
  int64_t times = 1;
};

// The launches of one call, in order; without a heap allocation, since every new call is planned.
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

// Waves of lora_gemm's tiles over Y or dX; with wgmma of pairs of tiles, on pairs of SMs.
struct Waves {
  int64_t whole, workers, tiles;
  int64_t idle() const { return whole * workers - tiles; }  // workers without one of the last tiles
};
Waves waves_of(const Card& card, const TileFacts& tile, const Problem& problem);
// flop as in Launch.
double tiles_flop(const Card& card, const TileFacts& tile, const Problem& problem);

// The launches of a plan on any route; for many adapters only those that one adapter has, too.
Launches launches_of(const Card& card, const Problem& problem, const Plan& plan);
double predicted_us(const Card& card, const Problem& problem, const Plan& plan);

// Of the library route: the library's product [m, n] = [m, k] [k, n]; if it accumulates, it also
// reads what it adds to.
Launch library_product(const Card& card, Dtype dtype, const char* name, int64_t m, int64_t n,
                       int64_t k, bool accumulate = false);
Launches library_launches(const Card& card, const Problem& problem);

}  // namespace lora_ext::plan
