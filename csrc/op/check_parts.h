// What the checks of one adapter and of many have in common. `op` is of Python's name, for which
// they refuse.
#pragma once

#include <c10/util/Exception.h>

#include "common/call.h"

#define EXPECT(condition, ...) TORCH_CHECK(condition, "lora_ext.", op, ": ", __VA_ARGS__)
#define EXPECT_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, "lora_ext.", op, ": ", __VA_ARGS__)

namespace lora_ext {

// One of the four dtypes.
void check_supported(const char* op, const char* name, at::ScalarType dtype);
void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& x);

// The weight's and the bias's shapes, for x.
void check_weight(const char* op, const at::Tensor& x, const Base& base);
void check_weight_dtypes(const char* op, at::ScalarType dtype, const Base& base);
void check_weight_devices(const char* op, const at::Tensor& x, const Base& base);

// Of lora_a, beside an x of dtype.
bool is_adapter_dtype(at::ScalarType adapter, at::ScalarType dtype);
// x's dtype as messages name what an adapter may have.
const char* or_float32(at::ScalarType dtype);

// y of a given base, or the gradient of y.
void check_output(const char* op, const char* name, const at::Tensor& y, const at::Tensor& x,
                  const c10::SymInt& out_features);
// S of a backward.
void check_s(const char* op, const at::Tensor& s, const at::Tensor& x, const c10::SymInt& rank);

void check_seed(const char* op, const at::Tensor& seed);
void check_probability(const char* op, double dropout_p);
void check_offsets(const char* op, const c10::SymInt& row_offset, const c10::SymInt& col_offset);
// Probability, offsets and the seed that they need.
void check_dropout(const char* op, const at::Tensor& x, const DropoutArgs& dropout);

}  // namespace lora_ext
