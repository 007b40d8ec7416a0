// Sets of kernels, and which of them have been compared with the op in float64 on a device, with what
// result.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/plan/plan.h"

// A set is what one call uses together: the unit that is checked. Here are all sets, and a small
// case for each.
namespace lora_ext::kernel_set {

// Everything that selects an instance.
struct Kernels {
  bool backward;
  Dtype dtype;  // kBFloat16 or kFloat16
  plan::Tile tile;
  bool hybrid, vector, float_adapters, dropout;
  bool one_pass, wide;   // lora_dsdb, and its instance for more than 16 columns; backward only
  int tail;              // the rank's tail, which selects instances of tiles with wgmma; else 0
  bool uses_pdl;         // some are launched with PDL
  bool given_base;       // lora_gemm adds onto a given y; forward only
  bool grouped = false;  // many adapters in one call
  bool experts =
      false;  // each with a weight of its own, whose columns have unit stride if transposed
  bool transposed = false;
  int rows = 0;  // the most rows that lora_decode's instance takes; 0 for other kernels

  auto operator<=>(const Kernels&) const = default;
  std::string name() const;  // unique
};

// The kernels of a plan for the problem; the plan must use kernels.
Kernels of_plan(const plan::Plan& plan, const plan::Problem& problem);

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

namespace lora_ext::kernel_check {

using kernel_set::Kernels;

// "" if the check has passed, "not yet", or what failed.
std::string result(const at::Device& device, const Kernels& kernels);
std::vector<std::pair<Kernels, std::string>> results(const at::Device& device);

// Runs the small case, unless it has run before, and returns the result as above. It synchronises
// with the device. No lock is held meanwhile: if two threads use the kernels for the first time at
// once, both run the case, and the first result stays.
//
// Only definite results are remembered: equal, different, or cannot be launched. If the case could
// not be allocated or compared, for example for lack of memory, it throws and remembers nothing. If
// the kernels ended in a fault of the device, or had not ended within the timeout, it throws and
// remembers this: nothing else of the process may then run on the device.
std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels);

// Stores a result that another process has found: "" or what failed.
// Returns the result that is remembered: the first one stays.
std::string remember(const at::Device& device, const Kernels& kernels, const std::string& result);

// How long kernels may run after their launch has returned: 10 s by default; to be set to infinity
// under a tool that slows them down.
void set_timeout(double seconds);
double timeout();

// Sets a function that gets the message about a failure, instead of TORCH_WARN.
void set_warn(std::function<void(const std::string&)> warn);

}  // namespace lora_ext::kernel_check
