// Which products are computed in one pass, by panels, and the operands of the pass.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

#include "common/base_linear.h"
#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/fused_product.h"
#include "cpu/operands.h"
#include "cpu/panel_choice.h"

namespace lora_ext::cpu {
namespace {

// By the name of a candidate; "none": torch's product.
std::optional<Dtype> named_panel(const std::string& name, Dtype x) {
  if (name == "none") return {};
  const Dtype panel = name == "bfloat16" ? Dtype::kBFloat16 : Dtype::kFloat32;
  TORCH_CHECK_VALUE((panel == Dtype::kBFloat16 || name == "float32") && has_panels_of(panel, x),
                    "lora_ext: expected panels that this processor can multiply with ",
                    scalar_type_of(x), ", or none, but got ", name);
  return panel;
}

// The rows of each matrix, on average.
int64_t rows_of_each(const at::Tensor& p, const Experts* experts) {
  const int64_t matrices = experts == nullptr ? 1 : static_cast<int64_t>(experts->rows.size());
  return p.size(0) / std::max<int64_t>(1, matrices);
}

ProductKind kind_of(const at::Tensor& p, const at::Tensor& q) {
  return {dtype_of(p.scalar_type()), q.size(0), q.size(1), q.stride(1) != 1};
}

// The weight as Q, or that of an expert.
at::Tensor matrix_of(const Base& base, bool is_forward, int64_t expert = 0) {
  const at::Tensor weight = base.weight.dim() == 2 ? base.weight : base.weight.select(0, expert);
  return is_forward ? weight.t() : weight;
}

std::optional<at::Tensor> bias_of(const Base& base, int64_t expert) {
  return base.bias ? std::optional(base.bias->select(0, expert)) : std::nullopt;
}

// The dtype of the panels of the base's product; batch-invariant calls take panels wherever they can.
std::optional<Dtype> base_panel(const at::Tensor& p, const Base& base, const Experts* experts,
                                bool is_forward) {
  if (base.is_given()) return {};
  if (base.row_block > 0 && p.size(1) <= kMaxPanelDepth) {
    return batch_invariant_panel_dtype(dtype_of(p.scalar_type()));
  }
  if (is_forward ? base.packed : base.packed_t) return {};
  return faster_panel(kind_of(p, matrix_of(base, is_forward)), rows_of_each(p, experts));
}

// P in memory as the library takes A. It keeps a kernel for each pitch, so that of a wider matrix,
// as a slice has it, would add one more; and rows may overlap, or lie too far apart.
at::Tensor with_own_pitch(const at::Tensor& p) {
  return p.stride(0) == p.size(1) ? p : p.clone(at::MemoryFormat::Contiguous);
}

// All of one dtype; P and out have last stride 1. Q and its bias are those of each part, of which
// `q` has the strides.
void multiply_parts(const at::Tensor& any_p, const at::Tensor& q,
                    const std::vector<BasePart>& parts, const LowRank& low_rank, Dtype panel,
                    const at::Tensor& out) {
  const Dtype dtype = dtype_of(any_p.scalar_type());
  const RowIndex rows = low_rank.rows;
  const bool by_library = dtype == Dtype::kFloat32 && rows.at == nullptr;
  const at::Tensor p = by_library ? with_own_pitch(any_p) : any_p;
  TileArgs tile{};
  tile.y = out.mutable_data_ptr(), tile.dtype = dtype, tile.y_pitch = out.stride(0);
  tile.dropout = low_rank.dropout, tile.rows = rows, tile.mask = low_rank.mask;
  multiply({*fused_gemm_kernels(), panel, p.const_data_ptr(), dtype, p.stride(0), rows, p.size(1),
            out.size(1), MatrixView{nullptr, dtype, q.stride(0), q.stride(1)}, tile, parts,
            low_rank.updates, low_rank.makes_t, low_rank.p_mask});
}

// bias: of the part, or undefined.
BasePart part_of(Range rows, const at::Tensor& q, const at::Tensor& bias) {
  return {rows, q.const_data_ptr(), bias.defined() ? bias.const_data_ptr() : nullptr};
}

// A product for each expert.
at::Tensor products_of_experts(const at::Tensor& p, const Base& base, const Experts& experts,
                               bool is_forward) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      base.row_block == 0,
      "lora_ext.batch_invariant: expected experts that panels can multiply, in "
      "a dtype that has them and with at most ",
      kMaxPanelDepth, " columns, but got ", base.weight.scalar_type(), " of ", base.weight.sizes(),
      "; call them outside of the block");
  for (const Experts::Rows& each : experts.rows) {
    const int64_t count = each.end - each.begin;
    at::Tensor out = experts.out.narrow(0, each.begin, count);
    product(p.narrow(0, each.begin, count), matrix_of(base, is_forward, each.expert),
            is_forward ? bias_of(base, each.expert) : std::nullopt, out);
  }
  return experts.out;
}

}  // namespace

std::optional<Dtype> fused_panel(const at::Tensor& p, const Base& base, const Experts* experts,
                                 bool is_forward) {
  return rows_of_each(p, experts) >= kMinPanelRows || base.row_block > 0
             ? base_panel(p, base, experts, is_forward)
             : std::nullopt;
}

at::Tensor fused_product(const at::Tensor& p, const Base& base, const Experts* experts, Dtype panel,
                         const LowRank& low_rank, bool is_forward) {
  const at::Tensor q = matrix_of(base, is_forward);
  at::Tensor bias, out;
  if (is_forward && base.bias) bias = base.bias->contiguous();
  std::vector<BasePart> parts;
  if (experts == nullptr) {
    out = at::empty({p.size(0), q.size(1)}, p.options());
    parts.push_back(part_of({0, p.size(0)}, q, bias));
  } else {
    out = experts->out;
    for (const Experts::Rows& each : experts->rows) {
      parts.push_back(part_of({each.begin, each.end}, matrix_of(base, is_forward, each.expert),
                              bias.defined() ? bias.select(0, each.expert) : bias));
    }
  }
  multiply_parts(p, q, parts, low_rank, panel, out);
  return out;
}

at::Tensor forward_of_base(const at::Tensor& x, const Base& base, const Experts* experts) {
  const std::optional<Dtype> panel = base_panel(x, base, experts, true);
  if (panel) return fused_product(x, base, experts, *panel, {}, true);
  return experts == nullptr ? base_forward(x, base) : products_of_experts(x, base, *experts, true);
}

at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                            const Experts* experts) {
  const std::optional<Dtype> panel = base_panel(grad, base, experts, false);
  if (panel) return fused_product(grad, base, experts, *panel, {}, false);
  return experts == nullptr ? base_backward(grad, x, base)
                            : products_of_experts(grad, base, *experts, false);
}

void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out, const std::optional<std::string>& panels) {
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
  const auto panel_of = [&]() -> std::optional<Dtype> {
    if (p.size(1) > kMaxPanelDepth) return {};
    return panels ? named_panel(*panels, dtype_of(p.scalar_type()))
                  : faster_panel(kind_of(p, q), p.size(0));
  };
  if (const auto panel = by_pointers ? panel_of() : std::nullopt) {
    at::Tensor bias_row;
    if (bias) bias_row = bias->contiguous();
    multiply_parts(p, q, {part_of({0, p.size(0)}, q, bias_row)}, {}, *panel, out);
    out.unsafeGetTensorImpl()->bump_version();
  } else if (bias) {
    at::addmm_out(out, *bias, p, q);
  } else {
    at::mm_out(out, p, q);
  }
}

}  // namespace lora_ext::cpu
