// From tensors to a planned launch: problem, workspace, operands, stream.
#pragma once

#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "common/call.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel_launch {

bool has_kernels(const at::Device& device);  // CUDA devices; in tests, the CPU
plan::Card card_of(const at::Device& device);
bool is_capturing(const at::Device& device);  // on the current stream

plan::Problem problem_of(const ForwardArgs& args);
plan::Problem problem_of(const BackwardArgs& args);

// Waits for the current stream, for at most `seconds`. Returns "" or the error with which its
// kernels ended; nullopt if they have not ended.
std::optional<std::string> wait(const at::Device& device, double seconds);

class LaunchError : public c10::Error {
  using Error::Error;
};

// Launches the kernels of the plan on the current stream and allocates the results. Throws
// LaunchError if a launch fails.
Forward run(const plan::Plan& plan, const ForwardArgs& args);
Backward run(const plan::Plan& plan, const BackwardArgs& args);

}  // namespace lora_ext::kernel_launch
