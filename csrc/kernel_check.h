// Which kernels of a device have been compared with the library route, and with what result.
#pragma once

#include <c10/core/Device.h>

#include <string>

#include "kernel_set.h"

namespace lora_ext::kernel_check {

using kernel_set::Kernels;

// "" where the check has passed, "not yet", or what failed.
std::string result(const at::Device& device, const Kernels& kernels);

// Runs the small case, unless it has run before; the result as above. It synchronises.
std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels);

}  // namespace lora_ext::kernel_check
