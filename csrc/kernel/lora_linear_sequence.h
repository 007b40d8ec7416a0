// The LoRA linear as a sequence of kernels: follows a plan (plan.h) on operands in one workspace.
//
//     forward    split A, B -> shrink: Z -> reduce: S, T -> gemm: Y      (or in-grid gemm: S, T, Y)
//     backward   split A, B, S -> dsdb: Z, G_B  (or shrink: Z) -> reduce: T = dS -> gemm: dX
//                (or in-grid gemm: T, dX)
//                -> wgrad: G_A (and G_B) -> reduce_wgrad: dA, dB
//
// In a hybrid plan gemm leaves out the base product, which the library then accumulates onto Y and
// dX.
//
// A launcher is called as launch(kernel, grid, threads, shared bytes, parameters), and for gemm on
// wgmma, whose instances are compiled elsewhere, as launch.lora_gemm_sm90a(parameters, choice) or
// launch.lora_gemm_in_grid_sm90a(...); launch.clear(flags, count) makes flags zero. It decides
// where kernels run: csrc/cuda/ on a stream of a GPU, tests/emulator/ in the execution layer.
#pragma once
#include <algorithm>

#include "kernel/lora_dsdb_sm80.h"
#include "kernel/lora_gemm_sm80.h"
#include "kernel/lora_gemm_sm90a_choice.h"
#include "kernel/lora_gemm_sm90a_in_grid_params.h"
#include "kernel/lora_linear.h"
#include "kernel/lora_reduce.h"
#include "kernel/lora_reduce_wgrad.h"
#include "kernel/lora_shrink_sm80.h"
#include "kernel/lora_split.h"
#include "kernel/lora_wgrad_sm80.h"

namespace lora_ext::kernel {

template <class Tile>
constexpr bool is_as_planned(const plan::TileFacts& facts) {
  return facts.rows == Tile::kM && facts.columns == Tile::kN &&
         facts.shared == Tile::kSharedBytes && facts.masks == fits_mask<Tile>;
}
static_assert(is_as_planned<LoraGemmTile128x256>(plan::facts_of(plan::Tile::k128x256)));
static_assert(is_as_planned<LoraGemmTile128x128>(plan::facts_of(plan::Tile::k128x128)));
static_assert(is_as_planned<LoraGemmTile128x64>(plan::facts_of(plan::Tile::k128x64)));

template <class T, class Fault, class Launch>
class LoraLinearSequence {
 public:
  LoraLinearSequence(const plan::Plan& plan, const LoraLinearOperands& operands, Launch& launch)
      : plan_(plan), o_(operands), launch_(launch) {}

  void forward(const LoraLinearForward& f) {
    split(/*a=*/true, /*b=*/true, nullptr);
    if (!plan_.in_grid()) {
      LoraShrinkParams<T> shrink = shrink_params(o_.x, o_.x_pitch, o_.k);
      shrink.a = a_halves().hi, shrink.a_pitch = a_halves().pitch, shrink.mask = o_.mask;
      launch_shrink<false>(shrink, o_.dropout);
      reduce(plan_.shrink.splits, static_cast<int>(o_.rank), f.s, o_.mask.keep_scale);
    }
    LoraGemmParams<T> gemm{};
    gemm.p = in_t(o_.x), gemm.p_pitch = o_.x_pitch, gemm.y = static_cast<T*>(f.y);
    gemm.n = static_cast<int>(o_.n), gemm.k = static_cast<int>(o_.k), gemm.y_pitch = o_.n;
    gemm.bias = f.bias, gemm.float_bias = f.float_bias;
    low_rank(gemm, b_halves());
    if (plan_.in_grid()) {
      launch_in_grid(gemm, a_halves(), f.s, {plan_.gemm.tile, false, false, false});
    } else {
      launch_gemm<false, false>(gemm);
    }
  }

  void backward(const LoraLinearBackward& g) {
    const bool need_ds = g.dx != nullptr || g.da != nullptr;
    split(g.dx != nullptr, need_ds, g.db != nullptr ? g.s : nullptr);
    if (plan_.one_pass) {
      launch_dsdb(g);
    } else if (need_ds && !plan_.in_grid()) {
      LoraShrinkParams<T> shrink = shrink_params(g.dy, g.dy_pitch, o_.n);
      shrink.a = b_halves().hi, shrink.a_pitch = b_halves().pitch;
      launch_shrink<true>(shrink, false);
    }
    if (need_ds && !plan_.in_grid())
      reduce(plan_.one_pass ? plan_.panels : plan_.shrink.splits, plan_.width, nullptr, 1.f);
    if (g.dx != nullptr) {
      LoraGemmParams<T> gemm{};
      gemm.p = in_t(g.dy), gemm.p_pitch = g.dy_pitch, gemm.y = static_cast<T*>(g.dx);
      gemm.n = static_cast<int>(o_.k), gemm.k = static_cast<int>(o_.n), gemm.y_pitch = o_.k;
      gemm.mask = o_.mask;
      low_rank(gemm, a_halves());
      if (plan_.in_grid()) {
        launch_in_grid(gemm, b_halves(), nullptr, {plan_.gemm.tile, true, o_.dropout, false});
      } else if (o_.dropout) {
        launch_gemm<true, true>(gemm);
      } else {
        launch_gemm<true, false>(gemm);
      }
    }
    wgrad(g);
  }

 private:
  struct Halves {
    const T *hi, *lo;  // lo is null without one
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
    return {hi, two() ? hi + o_.rank * plan_.a_pitch : nullptr, plan_.a_pitch};
  }
  Halves b_halves() const {
    if (plan_.b == plan::kNone) return {in_t(o_.b.data), nullptr, o_.b.row_stride};
    return in_columns(plan_.b);
  }
  // Halves side by side, [rows, columns].
  Halves in_columns(int64_t offset) const {
    const T* hi = at(offset);
    return {hi, two() ? hi + plan_.width : nullptr, plan_.columns};
  }
  bool two() const { return plan_.terms == 2; }

  static unsigned blocks_of(int64_t count, int64_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
  }
  // For kernels with one thread an element, which go on beyond the grid.
  static unsigned blocks_for(int64_t elements) {
    constexpr int64_t kMostBlocks = 2048;
    return static_cast<unsigned>(std::min<int64_t>((elements + 255) / 256, kMostBlocks));
  }

  void split(bool a, bool b, const float* s) {
    LoraSplitParams<T> params{};
    unsigned count = 0;
    int64_t most = 0;
    const auto add = [&](const Matrix& from, bool in_float, float scale, Halves to, int64_t rows,
                         int64_t columns, int64_t width) {
      params.matrix[count++] = {from.data,
                                {const_cast<T*>(to.hi), const_cast<T*>(to.lo)},
                                from.row_stride,
                                from.column_stride,
                                to.pitch,
                                static_cast<int>(rows),
                                static_cast<int>(columns),
                                static_cast<int>(width),
                                in_float,
                                scale};
      most = std::max(most, rows * width);
    };
    if (a && plan_.a != plan::kNone)
      add(o_.a, o_.float_adapters, 1.f, a_halves(), o_.rank, o_.k, plan_.a_pitch);
    if (b && plan_.b != plan::kNone)
      add(o_.b, o_.float_adapters, 1.f, b_halves(), o_.n, o_.rank, plan_.width);
    if (s != nullptr)
      add({s, o_.rank, 1}, true, o_.scaling, in_columns(plan_.s), o_.m, o_.rank, plan_.width);
    if (count > 0) launch_(lora_split<T, Fault>, dim3(blocks_for(most), count), 256, 0, params);
  }

  LoraShrinkParams<T> shrink_params(const void* x, int64_t pitch, int64_t k) const {
    LoraShrinkParams<T> params{};
    params.x = in_t(x), params.x_pitch = pitch, params.z = at<float>(plan_.z);
    params.m = static_cast<int>(o_.m), params.k = static_cast<int>(k);
    params.columns = plan_.z_columns, params.steps_per_split = plan_.shrink.steps_per_split;
    return params;
  }

  template <bool kMNMajor>
  void launch_shrink(const LoraShrinkParams<T>& params, bool masked) {
    using Tile = LoraShrinkTile;
    const dim3 grid(blocks_of(params.m, Tile::kM), blocks_of(params.columns, Tile::kN),
                    static_cast<unsigned>(plan_.shrink.splits));
    const auto run = [&](auto kernel) {
      launch_(kernel, grid, Tile::kThreads, Tile::kSlabs, params);
    };
    constexpr Alignment kV = Alignment::kVector, kE = Alignment::kElement;
    if constexpr (!kMNMajor) {
      if (masked) {
        return plan_.vector ? run(lora_shrink_sm80<T, kMNMajor, true, kV, Fault>)
                            : run(lora_shrink_sm80<T, kMNMajor, true, kE, Fault>);
      }
    }
    return plan_.vector ? run(lora_shrink_sm80<T, kMNMajor, false, kV, Fault>)
                        : run(lora_shrink_sm80<T, kMNMajor, false, kE, Fault>);
  }

  void reduce(int splits, int lo_column, float* s, float keep_scale) {
    LoraReduceParams<T> params{};
    params.z = at<float>(plan_.z), params.s = s;
    params.t[0] = at(plan_.t), params.t[1] = two() ? at(plan_.t) + plan_.width : nullptr;
    params.t_pitch = plan_.columns, params.m = static_cast<int>(o_.m), params.rank = o_.rank;
    params.splits = splits, params.terms = plan_.terms;
    params.z_pitch = plan_.z_columns, params.lo_column = lo_column;
    params.width = plan_.width, params.keep_scale = keep_scale, params.scaling = o_.scaling;
    launch_(lora_reduce<T, Fault>, dim3(blocks_for(o_.m * plan_.width)), 256, 0, params);
  }

  // T U: T is S or dS in the workspace. The terms with lo first, as lora_gemm.h has them.
  void low_rank(LoraGemmParams<T>& gemm, const Halves& u) const {
    if (plan_.hybrid) gemm.k = 0;
    gemm.q = in_t(o_.weight), gemm.q_pitch = o_.weight_pitch;
    gemm.m = static_cast<int>(o_.m), gemm.rank = o_.rank;
    const Halves t = in_columns(plan_.t);
    gemm.t_pitch = t.pitch, gemm.u_pitch = u.pitch;
    if (two()) {
      gemm.terms = 3;
      gemm.low_rank[0] = {t.lo, u.hi}, gemm.low_rank[1] = {t.hi, u.lo};
      gemm.low_rank[2] = {t.hi, u.hi};
    } else {
      gemm.terms = 1;
      gemm.low_rank[0] = {t.hi, u.hi};
    }
  }

  // Workspace comes as the allocator has it, so the flags are cleared before each launch.
  void launch_in_grid(const LoraGemmParams<T>& params, const Halves& factor, float* s,
                      const Sm90aChoice& choice) {
    auto* flags = at<uint32_t>(plan_.flags);
    launch_.clear(flags, plan_.flag_count);
    LoraInGridParams<T> in{};
    in.t = at(plan_.t), in.t_pitch = plan_.columns, in.width = plan_.width;
    in.s = s, in.scaling = o_.scaling, in.pairs_per_ticket = plan_.pairs_per_ticket;
    in.ticket = flags, in.finished = flags + plan::kFlagsApart;
    in.ready = flags + 2 * plan::kFlagsApart;
    launch_.lora_gemm_in_grid_sm90a(params, in, {factor.hi, factor.pitch}, choice);
  }

  template <bool kMNMajor, bool kMasked>
  void launch_gemm(const LoraGemmParams<T>& params) {
    const plan::Gemm& gemm = plan_.gemm;
    if (plan::facts_of(gemm.tile).wgmma)
      return launch_.lora_gemm_sm90a(params, {gemm.tile, kMNMajor, kMasked, gemm.early});
    if (!gemm.vector)
      return run_gemm<LoraGemmTile128x64, kMNMajor, kMasked, Alignment::kElement>(params);
    switch (gemm.tile) {
      case plan::Tile::k128x256:
        if constexpr (!kMasked)
          return run_gemm<LoraGemmTile128x256, kMNMajor, kMasked, Alignment::kVector>(params);
        [[fallthrough]];  // the planner gives no masked product this tile
      case plan::Tile::k128x128:
        return run_gemm<LoraGemmTile128x128, kMNMajor, kMasked, Alignment::kVector>(params);
      default:
        return run_gemm<LoraGemmTile128x64, kMNMajor, kMasked, Alignment::kVector>(params);
    }
  }
  template <class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment>
  void run_gemm(const LoraGemmParams<T>& params) {
    launch_(lora_gemm_sm80<T, Tile, kMNMajor, kMasked, kAlignment, Fault>,
            dim3(static_cast<unsigned>(plan_.gemm.blocks)), Tile::kThreads, Tile::kSharedBytes,
            params);
  }

  void launch_dsdb(const LoraLinearBackward& g) {
    LoraDsdbParams<T> params{};
    params.dy = in_t(g.dy), params.dy_pitch = g.dy_pitch;
    params.b = b_halves().hi, params.b_pitch = b_halves().pitch;
    params.s = at(plan_.s), params.s_pitch = plan_.columns;
    params.z = at<float>(plan_.z), params.g = at<float>(plan_.g_b);
    params.m = static_cast<int>(o_.m), params.n = static_cast<int>(o_.n);
    params.columns = plan_.columns, params.steps_per_split = plan_.dlora_b.steps_per_split;
    if (plan_.columns <= 16) {
      run_dsdb<16>(params);
    } else {
      run_dsdb<32>(params);
    }
  }
  template <int kColumns>
  void run_dsdb(const LoraDsdbParams<T>& params) {
    using Tile = LoraDsdbTile<kColumns>;
    const dim3 grid(static_cast<unsigned>(plan_.panels),
                    static_cast<unsigned>(plan_.dlora_b.splits));
    const auto run = [&](auto kernel) {
      launch_(kernel, grid, Tile::kThreads, Tile::kSharedBytes, params);
    };
    plan_.vector ? run(lora_dsdb_sm80<T, kColumns, Alignment::kVector, Fault>)
                 : run(lora_dsdb_sm80<T, kColumns, Alignment::kElement, Fault>);
  }

  void wgrad(const LoraLinearBackward& g) {
    LoraWgradParams<T> params{};
    LoraReduceWgradParams sums{};
    unsigned products = 0, gradients = 0;
    int64_t widest = 0;
    const auto add = [&](const plan::Splits& splits, int64_t c, int64_t partial, void* gradient,
                         bool transposed, float scale) {
      sums.gradient[gradients++] = {at<float>(partial),
                                    gradient,
                                    static_cast<int>(c),
                                    o_.rank,
                                    splits.splits,
                                    plan_.terms,
                                    plan_.columns,
                                    plan_.width,
                                    transposed,
                                    o_.float_adapters,
                                    scale};
      widest = std::max(widest, c);
    };
    const auto multiply = [&](const plan::Splits& splits, const void* p, int64_t pitch, int64_t u,
                              int64_t c, int64_t partial, bool masked) {
      params.product[products++] = {in_t(p),       at(u),         at<float>(partial),
                                    pitch,         plan_.columns, static_cast<int>(c),
                                    plan_.columns, splits.splits, splits.steps_per_split,
                                    masked};
    };
    if (g.da != nullptr) {
      multiply(plan_.dlora_a, o_.x, o_.x_pitch, plan_.t, o_.k, plan_.g_a, o_.dropout);
      add(plan_.dlora_a, o_.k, plan_.g_a, g.da, false, o_.mask.keep_scale);
    }
    if (g.db != nullptr) {
      if (!plan_.one_pass)
        multiply(plan_.dlora_b, g.dy, g.dy_pitch, plan_.s, o_.n, plan_.g_b, false);
      add(plan_.dlora_b, o_.n, plan_.g_b, g.db, true, 1.f);
    }
    if (products > 0) {
      params.m = static_cast<int>(o_.m), params.mask = o_.mask;
      const int c = std::max(params.product[0].c, params.product[1].c);
      const dim3 grid(blocks_of(c, LoraWgradTile::kC),
                      blocks_of(plan_.columns, LoraWgradTile::kColumns),
                      static_cast<unsigned>(params.product[0].splits + params.product[1].splits));
      const auto run = [&](auto kernel) {
        launch_(kernel, grid, LoraWgradTile::kThreads, LoraWgradTile::kSharedBytes, params);
      };
      constexpr Alignment kV = Alignment::kVector, kE = Alignment::kElement;
      if (params.product[0].masked) {
        plan_.vector ? run(lora_wgrad_sm80<T, true, kV, Fault>)
                     : run(lora_wgrad_sm80<T, true, kE, Fault>);
      } else {
        plan_.vector ? run(lora_wgrad_sm80<T, false, kV, Fault>)
                     : run(lora_wgrad_sm80<T, false, kE, Fault>);
      }
    }
    if (gradients > 0) {
      launch_(lora_reduce_wgrad<T, Fault>, dim3(blocks_for(widest * o_.rank), gradients), 256, 0,
              sums);
    }
  }

  const plan::Plan& plan_;
  const LoraLinearOperands& o_;
  Launch& launch_;
};

}  // namespace lora_ext::kernel
