// Parameters of each kernel of the LoRA linear, from a plan (plan::Tiled), the operands and the
// intermediates in the workspace.
#pragma once
#include <algorithm>

#include "kernels/gemm/params.h"
#include "kernels/lora_linear.h"
#include "kernels/skinny/dsdb.h"
#include "kernels/skinny/elementwise.h"
#include "kernels/skinny/shrink.h"
#include "kernels/skinny/wgrad.h"

namespace lora_ext::kernel {

template <class T>
class LoraLinearParams {
 public:
  LoraLinearParams(const plan::Tiled& plan, const LoraLinearOperands& operands)
      : plan_(plan), o_(operands) {}

  // Halves of A and B, unless they are used in their original layout, and of s S.
  struct Split {
    LoraSplitParams<T> params{};
    unsigned matrices = 0;
    int64_t max_elements = 0;
  };
  Split split(bool a, bool b, const float* s) const {
    Split out;
    const auto add = [&](const Matrix& from, bool in_float, float scale, Halves to, int64_t rows,
                         int64_t columns, int64_t width) {
      auto& matrix = out.params.matrix[out.matrices++];
      matrix.m = from.data, matrix.in_float = in_float, matrix.scale = scale;
      matrix.row_stride = from.row_stride, matrix.column_stride = from.column_stride;
      matrix.halves[0] = const_cast<T*>(to.hi), matrix.halves[1] = const_cast<T*>(to.lo);
      matrix.pitch = to.pitch, matrix.rows = static_cast<int>(rows);
      matrix.columns = static_cast<int>(columns), matrix.width = static_cast<int>(width);
      out.max_elements = std::max(out.max_elements, rows * width);
    };
    if (a && plan_.a != plan::kNone)
      add(o_.a, o_.float_adapters, 1.f, a_halves(), o_.rank, o_.k, plan_.a_pitch);
    if (b && plan_.b != plan::kNone)
      add(o_.b, o_.float_adapters, 1.f, b_halves(), o_.n, o_.rank, plan_.width);
    if (s != nullptr)
      add({s, o_.rank, 1}, true, o_.scaling, in_columns(plan_.s), o_.m, o_.rank, plan_.width);
    return out;
  }

  // Z = drop(X) A^T
  LoraShrinkParams<T> shrink() const {
    LoraShrinkParams<T> params = shrink_of(o_.x, o_.x_pitch, o_.k, a_halves());
    params.mask = o_.mask;
    return params;
  }
  // Z = dY B
  LoraShrinkParams<T> shrink(const LoraLinearBackward& g) const {
    return shrink_of(g.dy, g.dy_pitch, o_.n, b_halves());
  }

  // S and T from Z; s may be null.
  LoraReduceParams<T> reduce(float* s) const {
    return reduce_of(plan_.shrink.splits, static_cast<int>(o_.rank), s, o_.mask.keep_scale);
  }
  // T = dS
  LoraReduceParams<T> reduce() const {
    return reduce_of(plan_.t_sums(), plan_.width, nullptr, 1.f);
  }

  // Y = X W^T + T B^T + bias, or base + T B^T
  LoraGemmParams<T> gemm(const LoraLinearForward& f) const {
    LoraGemmParams<T> params{};
    params.p = in_t(o_.x), params.p_pitch = o_.x_pitch, params.y = static_cast<T*>(f.y);
    params.n = static_cast<int>(o_.n), params.k = static_cast<int>(o_.k), params.y_pitch = o_.n;
    params.bias = f.bias, params.float_bias = f.float_bias;
    params.base = in_t(f.base), params.base_pitch = f.base_pitch;
    low_rank(params, b_halves());
    return params;
  }
  // dX = dY W + mask * (T A)
  LoraGemmParams<T> gemm(const LoraLinearBackward& g) const {
    LoraGemmParams<T> params{};
    params.p = in_t(g.dy), params.p_pitch = g.dy_pitch, params.y = static_cast<T*>(g.dx);
    params.n = static_cast<int>(o_.k), params.k = static_cast<int>(o_.n), params.y_pitch = o_.k;
    params.mask = o_.mask, params.trigger_dependents = plan_.wgrad_uses_pdl;
    low_rank(params, a_halves());
    return params;
  }

  // Z = dY B and G_B = dY^T (s S)
  LoraDsdbParams<T> dsdb(const LoraLinearBackward& g) const {
    LoraDsdbParams<T> params{};
    params.dy = in_t(g.dy), params.dy_pitch = g.dy_pitch;
    params.b = b_halves().hi, params.b_pitch = b_halves().pitch;
    params.s = at(plan_.s), params.s_pitch = plan_.columns;
    params.z = at<float>(plan_.z), params.g = at<float>(plan_.g_b);
    params.m = static_cast<int>(o_.m), params.n = static_cast<int>(o_.n);
    params.columns = plan_.columns, params.steps_per_split = plan_.dlora_b.steps_per_split;
    return params;
  }

  // G_A = drop(X)^T dS, and G_B = dY^T (s S) unless lora_dsdb computes it.
  struct Wgrad {
    LoraWgradParams<T> params{};
    unsigned products = 0;
    int widest = 0;  // largest number of columns of P
    unsigned splits = 0;
  };
  Wgrad wgrad(const LoraLinearBackward& g) const {
    Wgrad out;
    const auto add = [&](const plan::Splits& splits, const void* p, int64_t pitch, int64_t u,
                         int64_t c, int64_t partial, bool masked) {
      LoraWgradProduct<T>& product = out.params.product[out.products++];
      product.p = in_t(p), product.u = at(u), product.g = at<float>(partial);
      product.p_pitch = pitch, product.u_pitch = plan_.columns;
      product.c = static_cast<int>(c), product.columns = plan_.columns;
      product.splits = splits.splits, product.steps_per_split = splits.steps_per_split;
      out.widest = std::max(out.widest, product.c);
      product.masked = masked;
      out.splits += static_cast<unsigned>(splits.splits);
    };
    if (g.da != nullptr) add(plan_.dlora_a, o_.x, o_.x_pitch, plan_.t, o_.k, plan_.g_a, o_.dropout);
    if (g.db != nullptr && !plan_.one_pass())
      add(plan_.dlora_b, g.dy, g.dy_pitch, plan_.s, o_.n, plan_.g_b, false);
    out.params.m = static_cast<int>(o_.m), out.params.mask = o_.mask;
    return out;
  }

  // dA and dB from G_A and G_B.
  struct ReduceWgrad {
    LoraReduceWgradParams params{};
    unsigned gradients = 0;
    int64_t max_elements = 0;
  };
  ReduceWgrad reduce_wgrad(const LoraLinearBackward& g) const {
    ReduceWgrad out;
    const auto add = [&](const plan::Splits& splits, int64_t c, int64_t partial, void* gradient,
                         bool transposed, float scale) {
      LoraReduceGradient& sum = out.params.gradient[out.gradients++];
      sum.g = at<float>(partial), sum.gradient = gradient, sum.c = static_cast<int>(c);
      sum.rank = o_.rank, sum.splits = splits.splits, sum.terms = plan_.terms;
      sum.g_columns = plan_.columns, sum.lo_column = plan_.width;
      sum.transposed = transposed, sum.in_float = o_.float_adapters, sum.scale = scale;
      out.max_elements = std::max(out.max_elements, c * o_.rank);
    };
    if (g.da != nullptr) add(plan_.dlora_a, o_.k, plan_.g_a, g.da, false, o_.mask.keep_scale);
    if (g.db != nullptr) add(plan_.dlora_b, o_.n, plan_.g_b, g.db, true, 1.f);
    return out;
  }

 private:
  struct Halves {
    const T *hi, *lo;  // lo is null if there is one term
    int64_t pitch;
  };

  static const T* in_t(const void* pointer) { return static_cast<const T*>(pointer); }
  template <class V = T>
  V* at(int64_t offset) const {
    return offset == plan::kNone ? nullptr : reinterpret_cast<V*>(o_.workspace + offset);
  }

  Halves a_halves() const {
    if (plan_.a == plan::kNone) return {in_t(o_.a.data), nullptr, o_.a.row_stride};
    const T* hi = at(plan_.a);
    return {hi, has_lo() ? hi + o_.rank * plan_.a_pitch : nullptr, plan_.a_pitch};
  }
  Halves b_halves() const {
    if (plan_.b == plan::kNone) return {in_t(o_.b.data), nullptr, o_.b.row_stride};
    return in_columns(plan_.b);
  }
  // The halves side by side, [rows, columns].
  Halves in_columns(int64_t offset) const {
    const T* hi = at(offset);
    return {hi, has_lo() ? hi + plan_.width : nullptr, plan_.columns};
  }
  bool has_lo() const { return plan_.terms == 2; }

  LoraShrinkParams<T> shrink_of(const void* x, int64_t pitch, int64_t k, const Halves& a) const {
    LoraShrinkParams<T> params{};
    params.x = in_t(x), params.x_pitch = pitch, params.a = a.hi, params.a_pitch = a.pitch;
    params.z = at<float>(plan_.z);
    params.m = static_cast<int>(o_.m), params.k = static_cast<int>(k);
    params.columns = plan_.z_columns, params.steps_per_split = plan_.shrink.steps_per_split;
    return params;
  }

  LoraReduceParams<T> reduce_of(int splits, int lo_column, float* s, float keep_scale) const {
    LoraReduceParams<T> params{};
    params.z = at<float>(plan_.z), params.s = s;
    params.t[0] = at(plan_.t), params.t[1] = has_lo() ? at(plan_.t) + plan_.width : nullptr;
    params.t_pitch = plan_.columns, params.m = static_cast<int>(o_.m), params.rank = o_.rank;
    params.splits = splits, params.terms = plan_.terms;
    params.z_pitch = plan_.z_columns, params.lo_column = lo_column;
    params.width = plan_.width, params.keep_scale = keep_scale, params.scaling = o_.scaling;
    return params;
  }

  // T U: T is s S or dS in the workspace. The terms with lo come first, as in gemm/params.h.
  void low_rank(LoraGemmParams<T>& gemm, const Halves& u) const {
    if (plan_.base != plan::Base::kKernel) gemm.k = 0;
    gemm.whole_chunks = plan_.vector;
    gemm.q = in_t(o_.weight), gemm.q_pitch = o_.weight_pitch;
    gemm.m = static_cast<int>(o_.m), gemm.rank = o_.rank;
    const Halves t = in_columns(plan_.t);
    gemm.t_pitch = t.pitch, gemm.u_pitch = u.pitch;
    if (has_lo()) {
      gemm.terms = 3;
      gemm.low_rank[0] = {t.lo, u.hi}, gemm.low_rank[1] = {t.hi, u.lo};
      gemm.low_rank[2] = {t.hi, u.hi};
    } else {
      gemm.terms = 1;
      gemm.low_rank[0] = {t.hi, u.hi};
    }
  }

  const plan::Tiled& plan_;
  const LoraLinearOperands& o_;
};

}  // namespace lora_ext::kernel
