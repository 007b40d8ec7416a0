// The planner in lora_ext._C: Card, Problem, Plan, and what the kernels of a device are doing.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace lora_ext {

void bind_plan(pybind11::module& m);

}  // namespace lora_ext
