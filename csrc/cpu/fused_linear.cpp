// Which products are computed in one pass, by panels, and the operands of the pass.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "common/base_linear.h"
#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/fused_product.h"
#include "cpu/operands.h"

namespace lora_ext::cpu {
namespace {

// The dtype of the panels if they are the faster way to P Q.
std::optional<Dtype> faster_panel(const at::Tensor& p, const at::Tensor& q) {
  const Dtype dtype = dtype_of(p.scalar_type());
  const std::optional<Dtype> panel = panel_dtype(dtype);
  if (p.size(1) > kMaxPanelDepth) return {};
  const bool is_copied = panel && *panel != dtype && q.stride(1) == 1;
  return is_copied || p.size(0) >= kMinPanelRows ? panel : std::nullopt;
}

// That of the base's product; batch-invariant calls are by panels wherever they can be.
std::optional<Dtype> base_panel(const at::Tensor& p, const Base& base, bool is_forward) {
  if (base.is_given()) return {};
  if (base.row_block > 0 && p.size(1) <= kMaxPanelDepth) {
    return batch_invariant_panel_dtype(dtype_of(p.scalar_type()));
  }
  if (is_forward ? base.packed : base.packed_t) return {};
  return faster_panel(p, is_forward ? base.weight.t() : base.weight);
}

// P in memory as the library takes A. It keeps a kernel for each pitch, so that of a wider matrix,
// as a slice has it, would add one more; and rows may overlap, or lie too far apart.
at::Tensor with_own_pitch(const at::Tensor& p) {
  return p.stride(0) == p.size(1) ? p : p.clone(at::MemoryFormat::Contiguous);
}

// All of one dtype; P and out have last stride 1.
void fused_product(const at::Tensor& any_p, const at::Tensor& q,
                   const std::optional<at::Tensor>& bias, const LowRank& low_rank, Dtype panel,
                   const at::Tensor& out) {
  const Dtype dtype = dtype_of(any_p.scalar_type());
  const RowIndex rows = low_rank.rows;
  const at::Tensor p = panel == dtype && rows.at == nullptr ? with_own_pitch(any_p) : any_p;
  at::Tensor bias_row;
  if (bias) bias_row = bias->contiguous();
  const std::vector<BasePart> parts{
      {{0, p.size(0)}, q.const_data_ptr(), bias ? bias_row.const_data_ptr() : nullptr}};
  TileArgs tile{};
  tile.y = out.mutable_data_ptr(), tile.dtype = dtype, tile.y_pitch = out.stride(0);
  tile.dropout = low_rank.dropout, tile.rows = rows;
  multiply({*fused_gemm_kernels(), panel, p.const_data_ptr(), dtype, p.stride(0), rows, p.size(1),
            out.size(1), MatrixView{nullptr, dtype, q.stride(0), q.stride(1)}, tile, parts,
            low_rank.updates});
}

}  // namespace

std::optional<Dtype> fused_panel(const at::Tensor& p, const Base& base, bool is_forward) {
  return p.size(0) >= kMinPanelRows || base.row_block > 0 ? base_panel(p, base, is_forward)
                                                          : std::nullopt;
}

at::Tensor fused_forward(const at::Tensor& x, const Base& base, Dtype panel,
                         const LowRank& low_rank) {
  const at::Tensor y = at::empty({x.size(0), base.weight.size(0)}, x.options());
  fused_product(x, base.weight.t(), base.bias, low_rank, panel, y);
  return y;
}

at::Tensor fused_backward(const at::Tensor& grad, const Base& base, Dtype panel,
                          const LowRank& low_rank) {
  const at::Tensor dx = at::empty({grad.size(0), base.weight.size(1)}, grad.options());
  fused_product(grad, base.weight, std::nullopt, low_rank, panel, dx);
  return dx;
}

at::Tensor forward_of_base(const at::Tensor& x, const Base& base) {
  const std::optional<Dtype> panel = base_panel(x, base, true);
  return panel ? fused_forward(x, base, *panel, {}) : base_forward(x, base);
}

at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base) {
  const std::optional<Dtype> panel = base_panel(grad, base, false);
  return panel ? fused_backward(grad, base, *panel, {}) : base_backward(grad, x, base);
}

void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out, bool batch_invariant) {
  // Whether a pointer says all of a tensor: what torch's dispatcher resolves goes to torch.
  const auto is_plain = [&](const at::Tensor& t) {
    const c10::DispatchKeySet keys = t.key_set();
    return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == p.scalar_type() &&
           !keys.has_any(
               c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                    c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor})) &&
           !(at::GradMode::is_enabled() && t.requires_grad());
  };
  const bool has_panels = p.scalar_type() == at::kFloat || is_half(p.scalar_type());
  const bool fits = has_panels && p.dim() == 2 && q.dim() == 2 && p.size(1) == q.size(0) &&
                    out.sizes() == at::IntArrayRef{p.size(0), q.size(1)} &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == q.size(1) && is_plain(*bias)));
  const bool by_pointers = fits && is_plain(p) && is_plain(q) && is_plain(out) && p.numel() != 0 &&
                           out.numel() != 0 && p.stride(1) == 1 && out.stride(1) == 1 &&
                           out.stride(0) >= out.size(1);
  const auto panel_of = [&] {
    return batch_invariant && p.size(1) <= kMaxPanelDepth
               ? batch_invariant_panel_dtype(dtype_of(p.scalar_type()))
               : faster_panel(p, q);
  };
  if (const auto panel = by_pointers ? panel_of() : std::nullopt) {
    fused_product(p, q, bias, {}, *panel, out);
    out.unsafeGetTensorImpl()->bump_version();
  } else if (bias) {
    at::addmm_out(out, *bias, p, q);
  } else {
    at::mm_out(out, p, q);
  }
}

}  // namespace lora_ext::cpu
