// One LoRA linear, forward and backward, on 2-D tensors: the contract between the op (op/,
// checks and shapes) and the routes that compute it.
//
//     S  = drop(X) A^T            Y  = X W^T + bias + s S B^T
//     dS = s dY B                 dX = dY W + mask * (dS A)
//     dA = dS^T drop(X)           dB = s dY^T S                  (never dW)
//
// drop(X) = keep_scale * mask * X, with the mask of philox.h. S keeps keep_scale, not s.
// M rows, K = in features, N = out features, r = rank.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "common/philox.h"

namespace lora_ext {

struct DropoutArgs {
  double p = 0.0;
  std::optional<at::Tensor> seed{};  // int64, one element, on x's device
  c10::SymInt row_offset = 0;        // symbols where shapes are, numbers for the routes
  c10::SymInt col_offset = 0;

  bool enabled() const { return p > 0.0 && keep_count() < philox::kKeepOne; }
  uint32_t keep_count() const { return philox::keep_count_of(p); }
  double keep_scale() const { return philox::keep_scale_of(keep_count()); }
  int64_t first_row() const { return row_offset.expect_int(); }
  int64_t first_col() const { return col_offset.expect_int(); }
};

// The frozen part of a layer: x W^T + bias of a weight, or the y that any other module returned.
struct Base {
  at::Tensor weight{};                   // [N, K], of x's dtype unless it is cast
  std::optional<at::Tensor> bias{};      // [N], of x's dtype, or float32
  bool cast_weight = false;              // weight and bias are of any dtype, and rounded to x's
  std::optional<at::Tensor> packed{};    // oneDNN's layout of weight, for a forward
  std::optional<at::Tensor> packed_t{};  // and of weight^T, for a backward
  at::Tensor y{};  // given in place of a weight: [M, N], last stride 1, of any dtype; in a forward

  static Base given(at::Tensor y = {}) {
    Base base;
    base.y = std::move(y);
    return base;
  }
  bool is_given() const { return !weight.defined(); }
  // Of Python's name, for messages: the op whose base it is.
  const char* op() const { return is_given() ? "lora_update" : "lora_linear"; }
};

// The trained part: scaling * (drop(x) lora_a^T) lora_b^T.
struct Update {
  at::Tensor lora_a;  // [r, K]
  at::Tensor lora_b;  // [N, r]
  double scaling = 1.0;
  DropoutArgs dropout{};

  int64_t rank() const { return lora_a.size(0); }
  int64_t in_features() const { return lora_a.size(1); }
  int64_t out_features() const { return lora_b.size(0); }
};

struct ForwardArgs {
  at::Tensor x;  // [M, K], last stride 1
  Base base;
  Update update;
  bool need_s = true;  // for backward

  at::ScalarType y_dtype() const { return (base.is_given() ? base.y : x).scalar_type(); }
};

struct BackwardArgs {
  at::Tensor grad;  // dY [M, N], last stride 1, dtype of y: x's, unless the base is given
  at::Tensor x;     // [M, K], last stride 1
  Base base;
  Update update;
  at::Tensor s;  // [M, r], accumulation dtype
  bool need_dx = true;
  bool need_dlora_a = true;
  bool need_dlora_b = true;
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
