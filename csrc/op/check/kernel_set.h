// A set of kernels: those that one call uses together. It is the unit that is checked on a device
// (kernel_check.h). Here are all sets, and a small case for each. Pure host code without torch.
#pragma once

#include <string>
#include <vector>

#include "kernels/plan/plan.h"

namespace lora_ext::kernel_set {

// Everything that selects an instance.
struct Kernels {
  bool backward;
  bool float16;  // else bfloat16
  plan::Tile tile;
  bool hybrid, vector, float_adapters, dropout;
  bool one_pass, wide;   // lora_dsdb, and its instance for more than 16 columns; backward only
  int tail;              // the rank's tail, which selects instances of tiles with wgmma; else 0
  bool early;            // some are launched with PDL
  bool given_base;       // lora_gemm adds onto a given y; forward only
  bool grouped = false;  // many adapters in one call
  int rows = 0;          // the most rows that lora_decode's instance takes; 0 for other kernels

  auto operator<=>(const Kernels&) const = default;
  std::string name() const;  // unique
};

// The kernels of a plan for the problem; the plan must use kernels.
Kernels of_plan(const plan::Plan& plan, const plan::Problem& problem, bool float16);

// All sets that a card can run, with PDL or without; none below compute capability 8.0.
std::vector<Kernels> all_of(const plan::Card& card, bool use_pdl);

// All sets for many adapters that a card can run.
std::vector<Kernels> all_grouped_of(const plan::Card& card);

// A problem and a request whose plan uses exactly these kernels, on a card that can run them. The
// operands are contiguous.
struct SmallCase {
  plan::Problem problem;
  plan::Request request;
};
SmallCase small_case(const Kernels& kernels);

}  // namespace lora_ext::kernel_set
