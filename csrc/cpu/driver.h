// The LoRA linear on the CPU: the base GEMM by the library, the low-rank part in vector code.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/call.h"
#include "cpu/fused_gemm.h"

namespace lora_ext::cpu {

// Why a call takes the library route, or "" if the vector kernels compute it.
std::string library_reason(at::ScalarType x, int64_t rank);

// Whether a row of y and dx has the same bits in any number of rows if base.row_block is set;
// otherwise such a call is made in equal blocks.
bool is_batch_invariant(at::ScalarType x, at::ScalarType y, const Update& update);

// nullopt if the library computes the call.
std::optional<Forward> forward(const ForwardArgs& args);
std::optional<Backward> backward(const BackwardArgs& args);

// A few rows: the factors are read once, in their original layout, since packing them would cost
// more than their products.
//
// Whether the kernels for few rows can read the factors: lora_a needs unit stride along its columns
// or its rank, lora_b along its rank.
bool strides_suit_few_rows(const Update& update);

// Y += s S B^T with S = scale drop(X) A^T, where Y is the result of the base.
Forward forward_few_rows(const ForwardArgs& args);

// dX += mask * (dS A) with dS = s dY B, where dX is that of the base; dA = dS^T drop(X),
// dB = s dY^T S.
Backward backward_few_rows(const BackwardArgs& args);

// Many adapters: the low-rank part of each in vector code over the adapter's rows. nullopt as above.
std::optional<Forward> forward_grouped(const ForwardArgs& args);
std::optional<Backward> backward_grouped(const BackwardArgs& args);

// The low-rank part of a product in one pass: nothing, that of one adapter, or of many.
struct LowRank {
  std::vector<RowUpdate> updates{};  // in the order of their rows
  Dropout dropout{};
  RowIndex rows{};  // the order in which rows are multiplied

  // T is [M, r] in float, U a view of the factor as [r, cols].
  static LowRank one(const at::Tensor& t, const AdapterView& u, double scale,
                     const Dropout& dropout = {}) {
    const Range all{0, t.size(0)};
    return {{{all, t.const_data_ptr<float>(), u, static_cast<float>(scale)}}, dropout};
  }
};

// The dtype of the panels if the base product of P, x or dY, and the low-rank part are computed in
// one pass (cpu/fused_product.h).
std::optional<Dtype> fused_panel(const at::Tensor& p, const Base& base, bool is_forward);

// Y of x, the base and low_rank, [M, N]: base.out, or a fresh tensor.
at::Tensor fused_forward(const at::Tensor& x, const Base& base, Dtype panel,
                         const LowRank& low_rank);
// dX of dY and the base, [M, K] in grad's dtype, the same.
at::Tensor fused_backward(const at::Tensor& grad, const Base& base, Dtype panel,
                          const LowRank& low_rank);

// The base's part alone, in that way or by the library.
at::Tensor forward_of_base(const at::Tensor& x, const Base& base);
at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base);

// out = P Q + bias, by panels or by torch, whichever is faster; torch's errors. panels: "none", or the
// dtype of panels to be used where P, Q and out can be read by pointers.
void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out, const std::optional<std::string>& panels = {});

}  // namespace lora_ext::cpu
