// Which kernels have been compared with the op in float64 on a device, and with what result.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "op/check/kernel_set.h"

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
