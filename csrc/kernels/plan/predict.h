// Predicts what a call takes on a card; no GPU has confirmed it.
//
//     launch   the longer of its products, in whole waves of blocks, and of its bytes; and what a
//              launch takes whatever its size, from the end of the one before it
//     call     the longer of its launches, one after the other, and of the host's work for them
#pragma once
#include <vector>

#include "kernels/plan/plan.h"

namespace lora_ext::plan {

// Microseconds of the host (assumed): of a call, from Python to the op and for autograd; of a launch
// of ours; of a call of the library with what it allocates; of an allocation of ours.
constexpr double kHostCallUs = 14, kHostLaunchUs = 2.2, kHostLibraryUs = 6.5,
                 kHostAllocationUs = 1.2;

// What a card is assumed to sustain: the library's half product at 4096 x 4096 x 4096, and
// mma.sync's share of its rate; a copy, read and written bytes together; and what a launch takes
// whatever its size: 1.5 us until it starts, 1 us for its first loads and last stores.
struct Sustained {
  double tflops, mma_share, dram_gb_s, launch_us = 2.5;
};
Sustained sustained_by(const Card& card);

// A kernel, or a call of the library. `share`: of the library's rate, what its main loop reaches.
// A block alone on an SM is assumed to be as fast as several together.
struct Launch {
  const char* name;
  double bytes = 0, flop = 0, share = 1;
  int64_t blocks = 1;
  int64_t launches = 1;  // 0: a part of the next one, or work of the host alone
  double host_us = kHostLaunchUs;
  double us(const Card& card) const;
};

// The launches of one call, in order.
using Launches = std::vector<Launch>;
Launches launches_of(const Plan& plan);
struct PredictedUs {
  double device, call;
};
PredictedUs predict(const Plan& plan);

// The library's product [m, n] = [m, k] [k, n]; if it accumulates, it also reads what it adds to.
Launch library_product(const Card& card, Dtype dtype, const char* name, int64_t m, int64_t n,
                       int64_t k, bool accumulate = false);
void add_library_launches(Launches& launches, const Card& card, const Problem& problem);

}  // namespace lora_ext::plan
