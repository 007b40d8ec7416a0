// Errors for the person who reads them: which tensor, what was expected, what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#define LORA_EXT_CHECK(condition, ...) TORCH_CHECK(condition, "lora_ext.lora_linear: ", __VA_ARGS__)
