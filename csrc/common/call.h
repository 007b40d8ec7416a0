// One LoRA linear, forward and backward, on 2-D tensors: the contract between the op (op/,
// checks and shapes) and the routes that compute it.
//
//     S  = drop(X) A^T            Y  = X W^T + s S B^T + bias
//     dS = s dY B                 dX = dY W + mask * (dS A)
//     dA = dS^T drop(X)           dB = s dY^T S                  (never dW)
//
// drop(X) = keep_scale * mask * X, with the mask of philox.h. S keeps keep_scale, not s.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/philox.h"

namespace lora_ext {

struct DropoutArgs {
  double p = 0.0;
  std::optional<at::Tensor> seed;  // int64, one element, on x's device
  int64_t row_offset = 0;
  int64_t col_offset = 0;

  bool enabled() const { return p > 0.0 && keep_count() < philox::kKeepOne; }
  uint32_t keep_count() const { return philox::keep_count_of(p); }
  double keep_scale() const { return philox::keep_scale_of(keep_count()); }
};

// M rows, K = in features, N = out features, r = rank.
struct ForwardArgs {
  at::Tensor x;                    // [M, K], last stride 1
  at::Tensor weight;               // [N, K], dtype of x
  at::Tensor lora_a;               // [r, K]
  at::Tensor lora_b;               // [N, r]
  std::optional<at::Tensor> bias;  // [N], dtype of x; for the kernel route also float32
  double scaling;
  DropoutArgs dropout;
  std::optional<at::Tensor> packed;  // oneDNN's layout of weight
  bool need_s = true;                // for backward
};

struct BackwardArgs {
  at::Tensor grad;    // dY [M, N], last stride 1, dtype of x
  at::Tensor x;       // [M, K], last stride 1
  at::Tensor weight;  // [N, K], dtype of x
  at::Tensor lora_a;  // [r, K]
  at::Tensor lora_b;  // [N, r]
  at::Tensor s;       // [M, r], accumulation dtype
  double scaling;
  DropoutArgs dropout;
  std::optional<at::Tensor> packed_t;  // oneDNN's layout of weight^T
  bool need_dx;
  bool need_dlora_a;
  bool need_dlora_b;
};

struct Forward {
  at::Tensor y;  // [M, N]
  at::Tensor s;  // [M, r], accumulation dtype; of any dtype where it is not needed
};

struct Backward {
  at::Tensor dx;       // [M, K], undefined when not needed
  at::Tensor dlora_a;  // [r, K]
  at::Tensor dlora_b;  // [N, r]
};

inline bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// The dtype in which S is kept and sums are made: float for half types, else the type itself.
inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return is_half(dtype) ? at::kFloat : dtype;
}

}  // namespace lora_ext
