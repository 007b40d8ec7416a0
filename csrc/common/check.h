// Errors for the person who reads them: which tensor, what was expected, what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#define LORA_EXT_CHECK(condition, ...) TORCH_CHECK(condition, "lora_ext.lora_linear: ", __VA_ARGS__)

// `op`, the name of a Python function, is a variable where these stand.
#define EXPECT(condition, ...) TORCH_CHECK(condition, "lora_ext.", op, ": ", __VA_ARGS__)
#define EXPECT_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, "lora_ext.", op, ": ", __VA_ARGS__)
