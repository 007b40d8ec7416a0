// Which instance of lora_gemm_sm90a computes a product: for those who launch it without its source.
#pragma once
#include <limits>

#include "plan/plan.h"

namespace lora_ext::kernel {

struct Sm90aChoice {
  plan::Tile tile;                                    // of wgmma
  bool mn_major, masked;                              // dX, and dX with dropout
  bool dependent;                                     // as in Sm90aLaunch
  int most_blocks = std::numeric_limits<int>::max();  // two a cluster
};

// The 16s along k that the last 64 of the rank need. Three are made in four: a rank of 48 is rare,
// and a quarter more kernels are not.
constexpr int tail_of(int rank) {
  const int sixteens = (rank - 1) % 64 / 16 + 1;
  return sixteens == 3 ? 4 : sixteens;
}

}  // namespace lora_ext::kernel
