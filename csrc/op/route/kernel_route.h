// The kernel route: a LoRA linear by the kernels of csrc/kernels/, if the planner chooses them.
//
// Until a card has measured evidence, the first use of each kernel on a device compares a small
// case with the op in float64. A kernel that disagrees, or cannot be launched, is not used again on
// this device, and one warning is given.
#pragma once

#include <optional>
#include <string>

#include "common/call.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel_route {

// nullopt if the library route is to be taken: because of the planner, of a check that failed, or
// of a kernel that cannot be checked while a graph is captured.
std::optional<Forward> forward(const ForwardArgs& args);
std::optional<Backward> backward(const BackwardArgs& args);

// The plan of forward or backward, and the result of the check of its kernels: "passed", "not yet",
// or what failed; "" without kernels. Only the row alignment of args.grad matters.
struct Explained {
  plan::Plan plan;
  std::string check;
};
Explained explain(const ForwardArgs& args);
Explained explain(const BackwardArgs& args);
// The same without tensors.
Explained explain_problem(const at::Device& device, const plan::Problem& problem, bool float16);

void set_choice(plan::Choice choice);
plan::Choice current_choice();
// Whether a kernel may begin before the previous one has ended (PDL).
void set_pdl(bool enabled);
bool current_pdl();
// The number of SMs of each device that plans leave to other work.
void set_reserved_sms(int count);
int reserved_sms();

}  // namespace lora_ext::kernel_route
