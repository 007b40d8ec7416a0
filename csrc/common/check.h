// Error messages name the tensor, what was expected and what was passed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#define LORA_EXT_CHECK(condition, ...) TORCH_CHECK(condition, "lora_ext.lora_linear: ", __VA_ARGS__)

// These macros use a variable `op`, the name of a Python function.
#define EXPECT(condition, ...) TORCH_CHECK(condition, "lora_ext.", op, ": ", __VA_ARGS__)
#define EXPECT_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, "lora_ext.", op, ": ", __VA_ARGS__)
