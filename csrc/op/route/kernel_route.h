// The kernel route: a LoRA linear by the kernels of csrc/kernel/, where the planner chooses them.
//
// Until a card has measured evidence, the first use of each kernel on a device compares a small
// case with the op in float64. A kernel that disagrees, or cannot be launched, is not used there
// again, and one warning says so.
#pragma once

#include <optional>
#include <string>

#include "common/call.h"
#include "plan/plan.h"

namespace lora_ext::kernel_route {

// nullopt where the planner, a check or a capture in progress wants the library route.
std::optional<Forward> forward(const ForwardArgs& args);
std::optional<Backward> backward(const BackwardArgs& args);

// What forward and backward would do, and what the check of those kernels has said: "passed", "not
// yet", or what failed; "" without kernels. Of args.grad only the rows' alignment counts.
struct Explained {
  plan::Plan plan;
  std::string check;
};
Explained explain(const ForwardArgs& args);
Explained explain(const BackwardArgs& args);
// Without tensors.
Explained explain_problem(const at::Device& device, const plan::Problem& problem, bool float16);

void set_choice(plan::Choice choice);
plan::Choice current_choice();
// Whether a kernel may begin before the one before it ends (programmatic dependent launch).
void set_early_launch(bool enabled);
bool current_early_launch();
// SMs of each device that plans leave to others.
void set_reserved_sms(int count);
int reserved_sms();

}  // namespace lora_ext::kernel_route
