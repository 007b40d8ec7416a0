// One call of the op, forward and backward, on 2-D tensors: the contract between the op (op/,
// checks and shapes) and the routes that compute it.
//
//     S  = drop(X) A^T            Y  = X W^T + bias + s S B^T
//     dS = s dY B                 dX = dY W + mask * (dS A)
//     dA = dS^T drop(X)           dB = s dY^T S                  (never dW)
//
// drop(X) = keep_scale * mask * X, with the mask of philox.h. S keeps keep_scale, not s.
// M rows, K = in features, N = out features, r = rank.
//
// With many adapters each row m has the A, B and s of adapter g = index[m], or no update; dA_g and
// dB_g are sums over the rows of g only, in the order of the rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "common/dtype.h"
#include "common/philox.h"

namespace lora_ext {

struct DropoutArgs {
  double p = 0.0;
  std::optional<at::Tensor> seed{};  // int64, one element, on x's device
  c10::SymInt row_offset = 0;        // symbolic if shapes are symbolic; a number in the routes
  c10::SymInt col_offset = 0;

  bool enabled() const { return p > 0.0 && keep_count() < philox::kKeepOne; }
  uint32_t keep_count() const { return philox::keep_count_of(p); }
  double keep_scale() const { return philox::keep_scale_of(keep_count()); }  // 1 without dropout
  int64_t first_row() const { return row_offset.expect_int(); }
  int64_t first_col() const { return col_offset.expect_int(); }
};

// The frozen part of a layer: x W^T + bias with a weight, or a y that another module returned.
struct Base {
  at::Tensor weight{};                   // [N, K], in x's dtype unless cast_weight is set
  std::optional<at::Tensor> bias{};      // [N], in x's dtype or float32
  bool cast_weight = false;              // weight and bias have any dtype and are rounded to x's
  std::optional<at::Tensor> packed{};    // weight in oneDNN's layout, for a forward
  std::optional<at::Tensor> packed_t{};  // weight^T in oneDNN's layout, for a backward
  // If positive, a row of y and dx has the same bits in any number of rows, at need by blocks of
  // this number.
  int64_t row_block = 0;
  at::Tensor y{};  // given instead of a weight, in a forward: [M, N], last stride 1, any dtype

  static Base given(at::Tensor y = {}) {
    Base base;
    base.y = std::move(y);
    return base;
  }
  bool is_given() const { return !weight.defined(); }
  bool of_experts() const { return !is_given() && weight.dim() == 3; }
  // That of one expert.
  Base of(int64_t expert) const {
    Base own;
    own.weight = weight.select(0, expert);
    if (bias) own.bias = bias->select(0, expert);
    return own;
  }
  // Name of the Python function, used in error messages.
  const char* op() const {
    return is_given() ? "lora_update" : of_experts() ? "experts.lora_experts" : "lora_linear";
  }
};

// A projection of experts: adapter g of a pool is expert g's, which has a weight of its own, g of
// base.weight [G, N, K] and of base.bias [G, N]. Where an expert has several adapters, of which a
// row has one, g is that of expert g / adapters. Y and dX have the rows sorted by adapter, those of
// none, zeros, last; x, grad and the mask have them elsewhere. What a mask keeps is not scaled.
struct ExpertRows {
  int64_t count;        // S, of sorted rows
  int64_t rank;         // of the factors, whose pools may be padded to whole chunks
  bool float_adapters;  // pools are two halves (kernels/tile/halves.h): hi, then lo
  // int32 [S]: the row of x, of grad and of the mask that a sorted row has; nullopt: its own number.
  std::optional<at::Tensor> x{}, grad{}, mask{};
  // In float32 or x's dtype [S]: of the rows in the gradients of the factors, by slot or by row.
  std::optional<at::Tensor> weights{};
  std::optional<at::Tensor> slots{};   // int32 [S]: each row's
  std::optional<at::Tensor> tables{};  // bytes, experts_routes', or made for the call
  std::optional<at::Tensor> t{};       // experts_low_rank's, beside tables, in a forward
  // base.weight may be of a slice of the experts, those from `first` on, whose rows are computed. A
  // call for the first slice computes all else; those for others write their rows into its y or dx,
  // `out`, in its workspace. Slices have no other route than the kernels.
  int64_t first = 0;
  int64_t adapters = 1;  // of each expert
  at::Tensor out{}, workspace{};
  bool goes_on() const { return first > 0; }
  int64_t expert_of(int64_t adapter) const { return adapter / adapters; }
  at::Tensor row_weights() const {
    return (slots ? weights->index_select(0, *slots) : *weights).to(at::kFloat);
  }
};

// In a call with many adapters: which adapter each row has, and the scaling of each adapter.
struct Grouping {
  at::Tensor scaling;                 // [G], float32; of experts undefined
  std::optional<at::Tensor> index{};  // int32, for each row: an adapter, or -1 for none; or
  std::optional<at::Tensor> offs{};   // [G], int32: adapter g has the rows from offs[g - 1] on
  std::optional<at::Tensor> ranks{};  // [G], int32, for a pool; 0 for a free slot
  std::optional<ExpertRows> experts{};
};

// Most calls have one adapter: its list needs no allocation.
using Factors = c10::SmallVector<at::Tensor, 1>;
using NeedsGrad = c10::SmallVector<bool, 1>;

// The trained part: scaling * (drop(x) lora_a^T) lora_b^T. One adapter, for all rows, has one
// matrix in each list.
struct Update {
  // [r, K] and [N, r] for each adapter; or a pool: one tensor [G, r, K] and one [G, N, r].
  Factors lora_a, lora_b;
  double scaling = 1.0;  // of one adapter, or of experts
  DropoutArgs dropout{};
  std::optional<Grouping> grouping{};  // with many adapters

  static Update one(at::Tensor lora_a, at::Tensor lora_b, double scaling,
                    DropoutArgs dropout = {}) {
    return {Factors{std::move(lora_a)}, Factors{std::move(lora_b)}, scaling, std::move(dropout)};
  }

  bool is_one() const { return !grouping; }
  // For calls with one adapter.
  const at::Tensor& a() const { return lora_a[0]; }
  const at::Tensor& b() const { return lora_b[0]; }

  bool is_pool() const { return lora_a.size() == 1 && lora_a[0].dim() == 3; }
  const ExpertRows* experts() const {
    return grouping && grouping->experts ? &*grouping->experts : nullptr;
  }
  c10::SymInt sym_adapters() const {
    return is_pool() ? lora_a[0].sym_size(0) : c10::SymInt(static_cast<int64_t>(lora_a.size()));
  }
  int64_t adapters() const { return sym_adapters().expect_int(); }
  // The rank; with many adapters the largest rank, which is the number of columns of S. It loops
  // over every adapter of a list.
  c10::SymInt sym_rank() const {
    if (is_pool()) return lora_a[0].sym_size(1);
    c10::SymInt most = lora_a[0].sym_size(0);
    for (size_t g = 1; g < lora_a.size(); ++g) most = most.max(lora_a[g].sym_size(0));
    return most;
  }
  int64_t rank() const {
    if (experts() != nullptr) return experts()->rank;
    if (is_pool()) return lora_a[0].size(1);
    int64_t most = 0;
    for (const at::Tensor& a : lora_a) most = std::max(most, a.size(0));
    return most;
  }
  int64_t in_features() const { return lora_a[0].size(-1); }
  int64_t out_features() const { return lora_b[0].size(-2); }
  // M, of Y and dX, beside an x.
  int64_t rows(const at::Tensor& x) const { return experts() ? experts()->count : x.size(0); }
};

struct ForwardArgs {
  at::Tensor x;  // [M, K], last stride 1
  Base base;
  Update update;
  bool need_s = true;  // for backward

  at::ScalarType y_dtype() const { return (base.is_given() ? base.y : x).scalar_type(); }
};

// The gradients that a backward is to compute.
struct Wanted {
  bool dx = true;
  NeedsGrad dlora_a, dlora_b;  // for each tensor of lora_a and lora_b
  bool dbias = false;          // computed by the op, not by the route

  static Wanted one(bool dx, bool a, bool b) { return {dx, NeedsGrad{a}, NeedsGrad{b}}; }
  bool any_a() const { return std::find(dlora_a.begin(), dlora_a.end(), true) != dlora_a.end(); }
  bool any_b() const { return std::find(dlora_b.begin(), dlora_b.end(), true) != dlora_b.end(); }
  bool any() const { return dx || any_a() || any_b(); }
};

struct BackwardArgs {
  at::Tensor grad;  // dY [M, N], last stride 1, dtype of y: x's, unless the base is given
  at::Tensor x;     // [M, K], last stride 1
  Base base;
  Update update;
  at::Tensor s;  // S of the forward
  Wanted wanted;
};

struct Forward {
  at::Tensor y;  // [M, N]
  // [M, r], accumulation dtype; any dtype if it is not needed. With many adapters each row has as
  // many columns as the rank of its adapter; the rest is not written.
  at::Tensor s;
  at::Tensor workspace{};  // of the kernels, for further slices of experts
};

struct Backward {
  at::Tensor dx;             // [M, K], undefined when not needed
  Factors dlora_a, dlora_b;  // those that are requested; the others are undefined
  at::Tensor workspace{};    // as of Forward

  // An empty result for one adapter.
  static Backward one() { return {{}, Factors{at::Tensor()}, Factors{at::Tensor()}}; }
  at::Tensor& da() { return dlora_a[0]; }
  at::Tensor& db() { return dlora_b[0]; }
};

// In the order of Dtype.
constexpr at::ScalarType kScalarTypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf,
                                           at::kBool};
inline at::ScalarType scalar_type_of(Dtype dtype) { return kScalarTypes[static_cast<int>(dtype)]; }

// Other dtypes, which the op refuses, count as float32.
inline Dtype dtype_of(at::ScalarType scalar_type) {
  const auto* found = std::find(std::begin(kScalarTypes), std::end(kScalarTypes), scalar_type);
  const bool known = found != std::end(kScalarTypes);
  return known ? static_cast<Dtype>(found - std::begin(kScalarTypes)) : Dtype::kFloat32;
}

inline bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// The dtype of S and of sums: float for half types, else the type itself.
inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return is_half(dtype) ? at::kFloat : dtype;
}

}  // namespace lora_ext
