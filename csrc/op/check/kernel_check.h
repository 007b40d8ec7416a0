// Which kernels of a device have been compared with the op in float64, and with what result.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "op/check/kernel_set.h"

namespace lora_ext::kernel_check {

using kernel_set::Kernels;

// "" where the check has passed, "not yet", or what failed.
std::string result(const at::Device& device, const Kernels& kernels);
std::vector<std::pair<Kernels, std::string>> results(const at::Device& device);

// Runs the small case, unless it has run before; the result as above. It synchronises. No lock is
// held meanwhile: two threads whose first uses coincide both run it, and the first result stays.
//
// Only what is known is remembered: equal, different, or cannot be launched. Throws, and remembers
// nothing, where the case could not be made or compared, as for lack of memory. Throws, and
// remembers, where the kernels ended in a device's fault or had not ended when their time was up:
// then nothing else of the process may run on the device.
std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels);

// A result that another process has found: "" or what failed.
// Returns what is remembered: the first result stays.
std::string remember(const at::Device& device, const Kernels& kernels, const std::string& result);

// How long kernels may take after their launch has returned: 10 s; infinity under a tool that
// slows them down.
void set_timeout(double seconds);
double timeout();

// Where the sentence about a failure goes, instead of to TORCH_WARN.
void set_warn(std::function<void(const std::string&)> warn);

}  // namespace lora_ext::kernel_check
