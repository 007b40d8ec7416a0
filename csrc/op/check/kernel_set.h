// The kernels that one call uses together, as the unit that is checked on a device
// (kernel_check.h): which there are, and a small case of each. Pure host code without torch.
#pragma once

#include <string>
#include <vector>

#include "plan/plan.h"

namespace lora_ext::kernel_set {

// Everything that selects an instance.
struct Kernels {
  bool backward;
  bool float16;  // else bfloat16
  plan::Tile tile;
  bool hybrid, vector, float_adapters, dropout;
  bool one_pass, wide;   // lora_dsdb, and its instance for more than 16 columns; backward only
  int tail;              // of the rank, which selects instances of wgmma's tiles; else 0
  bool early;            // some begin before the one before has ended
  bool given_base;       // lora_gemm adds onto a y that is given; forward only
  bool grouped = false;  // of many adapters in one call
  int rows = 0;          // the most of lora_decode's instance; 0 of other kernels

  auto operator<=>(const Kernels&) const = default;
  std::string name() const;  // no two have the same
};

// Of a plan for the problem, which must be one with kernels.
Kernels of_plan(const plan::Plan& plan, const plan::Problem& problem, bool float16);

// All that a card can be asked for, with early launches or without; none below compute capability
// 8.0.
std::vector<Kernels> all_of(const plan::Card& card, bool early_launch);

// Those of many adapters, likewise.
std::vector<Kernels> all_grouped_of(const plan::Card& card);

// A problem and a request whose plan takes just these kernels, on a card that has them. Its
// operands are contiguous.
struct SmallCase {
  plan::Problem problem;
  plan::Request request;
};
SmallCase small_case(const Kernels& kernels);

}  // namespace lora_ext::kernel_set
