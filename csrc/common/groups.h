// Many adapters in one call: which one each row uses, and their factors. The rest of a call is that
// of call.h.
//
//     y[m] = x[m] W^T + bias + s_g (drop(x)[m] A_g^T) B_g^T      g the adapter of row m, or none
//
// Gradients of A_g and B_g are sums over the rows of g alone, in the rows' order.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/call.h"

namespace lora_ext {

struct GroupedUpdate {
  // A list of [r_g, K] and of [N, r_g]; or a pool: one [G, r, K] and one [G, N, r].
  std::vector<at::Tensor> lora_a, lora_b;
  at::Tensor scaling;                 // [G], float32
  std::optional<at::Tensor> index{};  // int32, one for each row: an adapter, or -1 for none; or
  std::optional<at::Tensor> offs{};   // [G], int32: adapter g has the rows from offs[g - 1] on
  std::optional<at::Tensor> ranks{};  // [G], int32, of a pool; 0 where a slot is free
  DropoutArgs dropout{};

  bool is_pool() const { return lora_a.size() == 1 && lora_a[0].dim() == 3; }
  c10::SymInt sym_adapters() const {
    return is_pool() ? lora_a[0].sym_size(0) : c10::SymInt(static_cast<int64_t>(lora_a.size()));
  }
  int64_t adapters() const { return sym_adapters().expect_int(); }
  // The largest rank, for which S has room in every row. It takes a look at every adapter of a
  // list.
  c10::SymInt sym_max_rank() const {
    if (is_pool()) return lora_a[0].sym_size(1);
    c10::SymInt most = 0;
    for (const at::Tensor& a : lora_a) most = most.max(a.sym_size(0));
    return most;
  }
  int64_t max_rank() const {
    if (is_pool()) return lora_a[0].size(1);
    int64_t most = 0;
    for (const at::Tensor& a : lora_a) most = std::max(most, a.size(0));
    return most;
  }
  int64_t in_features() const { return lora_a[0].size(-1); }
  int64_t out_features() const { return lora_b[0].size(is_pool() ? 1 : 0); }
};

struct GroupedForwardArgs {
  at::Tensor x;  // [M, K], last stride 1
  Base base;
  GroupedUpdate update;

  at::ScalarType y_dtype() const { return (base.is_given() ? base.y : x).scalar_type(); }
};

struct GroupedBackwardArgs {
  at::Tensor grad;  // dY [M, N], last stride 1, dtype of y
  at::Tensor x;     // [M, K], last stride 1
  Base base;
  GroupedUpdate update;
  at::Tensor s;  // what the forward gave
  bool need_dx = true;
  // For each tensor of lora_a and of lora_b, whether it wants its gradient.
  std::vector<bool> need_dlora_a, need_dlora_b;
};

// S: [M, max rank], of each row as many columns as its adapter has ranks; the rest is not written.
using GroupedForward = Forward;

struct GroupedBackward {
  at::Tensor dx;                             // [M, K], undefined when not needed
  std::vector<at::Tensor> dlora_a, dlora_b;  // of each that wants one, else undefined
};

}  // namespace lora_ext
