// Chooses the route of a call: on CUDA the kernels if the planner chooses them, on the CPU the
// vector code, otherwise the library.
#pragma once

#include <atomic>
#include <optional>
#include <string>

#include "common/call.h"
#include "cpu/driver.h"
#include "cpu/experts.h"
#include "kernels/plan/plan.h"

namespace lora_ext::route {

Forward forward(ForwardArgs args);
Backward backward(const BackwardArgs& args);

// The experts of a mixture on a CPU, which have no other route; op: the name of the op in the error.
// Without an adapter S is undefined.
Forward forward(const char* op, const ForwardArgs& args, const cpu::Experts& experts);
Backward backward(const char* op, const BackwardArgs& args, const cpu::Experts& experts);
Forward forward_of_few_rows(const char* op, const ExpertsArgs& args);

// The same in blocks that all have base.row_block rows, so that the result of a row is the same in
// a call with any number of rows. Otherwise the library chooses its kernels, and a route its
// passes, by the number of rows.
//
// Y and S. A pack of the weight is not used.
Forward forward_in_blocks(const ForwardArgs& args);
// dX in blocks; dA and dB, which are sums over all rows, in one.
Backward backward_in_blocks(const BackwardArgs& args);

}  // namespace lora_ext::route

// A LoRA linear by CUDA kernels, if the planner chooses them.
//
// Until a card has measured evidence, the first use of each kernel on a device compares a small
// case with the op in float64. A kernel that disagrees, or cannot be launched, is not used again on
// this device, and one warning is given.
namespace lora_ext::kernel_route {

// nullopt if the library route is to be taken: because of the planner, of a check that failed, or
// of a kernel that cannot be checked while a graph is captured (an error with many adapters, whose
// library route cannot be captured).
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
Explained explain_problem(const at::Device& device, const plan::Problem& problem);

// What the user sets, for all threads.
struct Settings {
  std::atomic<plan::Choice> choice{plan::Choice::kAuto};
  std::atomic<bool> use_pdl{true};   // a kernel may begin before the previous one ends (PDL)
  std::atomic<int> reserved_sms{0};  // of each device, which plans leave to other work
};
Settings& settings();

}  // namespace lora_ext::kernel_route
