// The parts of the module lora_ext._C that know of plans and kernels.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>

#include "kernels/plan/plan.h"

namespace lora_ext {

void bind_plan(pybind11::module& m);
// To be called after bind_plan.
void bind_kernel_set(pybind11::module& m);
void bind_kernel_check(pybind11::module& m);

// From "auto", "hybrid", "kernel" or "library"; ValueError for other names.
plan::Choice choice_of(const std::string& name);

}  // namespace lora_ext
