// The LoRA linear on the CPU: the base GEMM by the library, the low-rank part in vector code.
#pragma once

#include <optional>
#include <string>

#include "common/call.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

// Why a call takes the library route, or "" if the vector kernels compute it.
std::string library_reason(at::ScalarType x, int64_t rank);

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

// T U of one adapter; T is [M, r] in float, U a view of the factor as [r, cols].
struct LowRank {
  const at::Tensor& t;
  const AdapterView& u;
  double scale;
  Dropout dropout{};
};

// Whether the base product of P, x or dY, and the low-rank part are computed in one pass
// (cpu/fused_gemm.h).
bool uses_fused_gemm(const at::Tensor& p, const Base& base, bool is_forward);

// Y of x and the base, a fresh tensor [M, N]; without low_rank the base's part alone.
at::Tensor fused_forward(const at::Tensor& x, const Base& base, const LowRank* low_rank);
// dX of dY and the base, a fresh tensor [M, K] in grad's dtype.
at::Tensor fused_backward(const at::Tensor& grad, const Base& base, const LowRank* low_rank);

// The base's part alone, in that way or by the library.
at::Tensor forward_of_base(const at::Tensor& x, const Base& base);
at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base);

// P Q + bias into out [rows, cols], all of one dtype; P and out have last stride 1. By panels, or by
// torch where those are not faster.
void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out);

}  // namespace lora_ext::cpu
