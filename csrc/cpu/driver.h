// The LoRA linear on the CPU: the base GEMM by the library, the low-rank part in vector code.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/call.h"
#include "cpu/fused_gemm.h"

namespace lora_ext::cpu {

// Why a call takes the library route, or "" if the vector kernels compute it.
std::string library_reason(at::ScalarType x, at::ScalarType y, int64_t rank);

// Whether a row of y and dx has the same bits in any number of rows if base.row_block is set;
// otherwise such a call is made in equal blocks.
bool is_batch_invariant(at::ScalarType x, at::ScalarType y, const Update& update);

// What a call has besides its operands if its rows are sorted by the experts of a mixture. The weight
// is then [E, N, K], the bias [E, N], both in x's dtype; the scaling has the mask's scale already.
struct Experts {
  struct Rows {
    int64_t expert, begin, end;
  };
  std::vector<Rows> rows;                 // of each expert, in their order
  at::Tensor out;                         // where y or dx is written
  std::optional<at::Tensor> mask_rows{};  // [M], int64: the mask's row of each row
  Factors da{}, db{};                     // where gradients are written
  std::optional<at::Tensor> weights{};    // float32 [M]: of a row's dS in dA, but not in dX
};

// nullopt if the vector kernels do not compute the call. experts: null for a layer's rows.
std::optional<Forward> forward(const ForwardArgs& args, const Experts* experts = nullptr);
std::optional<Backward> backward(const BackwardArgs& args, const Experts* experts = nullptr);

// The low-rank part of a product in one pass, of any number of adapters.
struct LowRank {
  std::vector<RowUpdate> updates{};  // in the order of their rows
  Dropout dropout{};
  RowIndex rows{};  // the order in which rows are multiplied
  MaskBits mask{};  // drawn before, for a walk on tiles
  bool makes_t = false;
  MaskBits p_mask{};
};

// The dtype of the panels if the base product of P, x or dY, and the low-rank part are computed in
// one pass (cpu/fused_product.h).
std::optional<Dtype> fused_panel(const at::Tensor& p, const Base& base, const Experts* experts,
                                 bool is_forward);

// Y of x, the base and low_rank, [M, N]; or dX of dY, [M, K] in its dtype: where `experts` says, or a
// fresh tensor.
at::Tensor fused_product(const at::Tensor& p, const Base& base, const Experts* experts, Dtype panel,
                         const LowRank& low_rank, bool is_forward);

// The base's part alone, in that way or by the library.
at::Tensor forward_of_base(const at::Tensor& x, const Base& base, const Experts* experts);
at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                            const Experts* experts);

// out = P Q + bias, by panels or by torch, whichever is faster; torch's errors. panels: "none", or the
// dtype of panels to be used where P, Q and out can be read by pointers.
void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out, const std::optional<std::string>& panels = {});

}  // namespace lora_ext::cpu
