// Which kernels of a device have been compared with the library route, and with what result.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "plan.h"

namespace lora_ext::kernel_check {

// The kernels that one call uses: everything that selects an instance.
struct Kernels {
  bool backward;
  at::ScalarType dtype;
  plan::Tile tile;
  bool hybrid, vector, float_adapters, dropout;
  bool one_pass, wide;  // lora_dsdb, and its instance for more than 16 columns; backward only
  int tail;             // of the rank, which selects instances of wgmma's tiles; else 0
  bool early;           // some begin before the one before has ended

  auto operator<=>(const Kernels&) const = default;
  std::string name() const;
};

// Of a plan, which must be one with kernels.
Kernels kernels_of(const plan::Plan& plan, bool backward, at::ScalarType dtype, bool float_adapters,
                   bool dropout);

// All that a card can be asked for, with early launches or without.
std::vector<Kernels> all_kernels(const plan::Card& card, bool early_launch);

// "" where the check has passed, "not yet", or what failed.
std::string result(const at::Device& device, const Kernels& kernels);

// Runs the small case, unless it has run before; the result as above. It synchronises.
std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels);

}  // namespace lora_ext::kernel_check
