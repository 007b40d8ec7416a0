// Parameters of each kernel of the LoRA linear with many adapters, from a plan (plan::Tiled), the
// operands, and the tables and intermediates in the workspace.
#pragma once
#include "kernels/grouped/gemm.h"
#include "kernels/grouped/own_weights.h"
#include "kernels/grouped/segments.h"
#include "kernels/grouped/shrink.h"
#include "kernels/grouped/wgrad.h"
#include "kernels/lora_grouped.h"

namespace lora_ext::kernel {

static_assert(LoraGroupedTables::kTileRows == plan::kGroupedTileRows &&
              LoraGroupedTables::kRowTileRows == plan::kGroupedRowTileRows &&
              LoraGroupedSegmentsParams::kChunk == plan::kGroupedChunk &&
              LoraGroupedEntriesParams::kMax == plan::kGroupedEntries);
static_assert(sizeof(LoraGroupedEntry) == plan::kGroupedEntryBytes &&
              sizeof(LoraGroupedSegment) == plan::kGroupedSegmentBytes &&
              sizeof(LoraGroupedPiece) == plan::kGroupedPieceBytes &&
              sizeof(LoraGroupedSum) == plan::kGroupedSumBytes);

template <class T>
class LoraGroupedParams {
 public:
  LoraGroupedParams(const plan::Tiled& plan, const LoraGroupedOperands& operands)
      : plan_(plan),
        tables_(tables_at(*plan.tables,
                          operands.tables != nullptr ? operands.tables : operands.workspace)),
        o_(operands) {}

  LoraGroupedEntry* entries() const { return at<LoraGroupedEntry>(plan_.tables->entries); }
  LoraGroupedEntry* gradient_entries() const {
    return at<LoraGroupedEntry>(plan_.tables->gradient_entries);
  }

  LoraGroupedSegmentsParams segments() const {
    LoraGroupedFactors factors = o_.factors.pool;
    factors.entries = entries();
    return {o_.rows, factors, tables_, o_.groups_per_weight};
  }

  // Z = drop(X) A_g^T
  LoraGroupedShrinkParams<T> shrink() const {
    LoraGroupedShrinkParams<T> params = shrink_of(o_.x, o_.x_pitch, o_.k, places().x);
    params.mask = o_.mask;
    return params;
  }
  // Z = dY B_g
  LoraGroupedShrinkParams<T> shrink(const LoraGroupedBackward& g) const {
    return shrink_of(g.dy, g.dy_pitch, o_.n, places().dy);
  }

  // S and T from Z
  LoraGroupedReduceParams<T> reduce(const LoraGroupedForward& f) const {
    LoraGroupedReduceParams<T> params = reduce_of();
    params.of[0] = reduced_to(plan_.t);
    params.of[0].s = f.s, params.of[0].keep_scale = o_.mask.keep_scale;
    return params;
  }
  // T = dS from Z, and with the rows' weights for dA; s S from S, with them
  LoraGroupedReduceParams<T> reduce(const LoraGroupedBackward& g) const {
    LoraGroupedReduceParams<T> params = reduce_of();
    LoraGroupedReduced<T>* next = params.of;
    if (plan_.t != plan::kNone) *next++ = reduced_to(plan_.t);
    if (weighted_t(g) != plan_.t)
      *next = reduced_to(plan_.weighted_t), (next++)->row_weights = g.row_weights;
    if (plan_.s != plan::kNone) {
      *next = reduced_to(plan_.s), next->saved = g.s;
      next->row_weights = g.row_weights;
    }
    return params;
  }

  // Y = X W^T + T B_g^T + bias, or base + T B_g^T
  LoraGroupedGemmParams<T> gemm(const LoraGroupedForward& f) const {
    LoraGroupedGemmParams<T> params = gemm_of(o_.x, o_.x_pitch, o_.n, o_.k, f.y);
    params.gemm.bias = f.bias, params.gemm.float_bias = f.float_bias;
    params.gemm.base = static_cast<const T*>(f.base), params.gemm.base_pitch = f.base_pitch;
    return params;
  }
  // dX = dY W + mask * (T A_g)
  LoraGroupedGemmParams<T> gemm(const LoraGroupedBackward& g) const {
    LoraGroupedGemmParams<T> params = gemm_of(g.dy, g.dy_pitch, o_.k, o_.n, g.dx);
    params.gemm.mask = o_.mask;
    return params;
  }

  // The same of experts, each with its own W and bias.
  LoraOwnWeightsParams<T> own_weights(const LoraGroupedForward& f) const {
    const LoraGroupedFactors& pool = o_.factors.pool;
    auto params = own_weights_of(gemm(f), pool.b, pool.b_pitch, pool.b_stride);
    params.bias_stride = o_.bias_stride, params.p_rows = o_.places.x;
    return params;
  }
  LoraOwnWeightsParams<T> own_weights(const LoraGroupedBackward& g) const {
    const LoraGroupedFactors& pool = o_.factors.pool;
    auto params = own_weights_of(gemm(g), pool.a, pool.a_pitch, pool.a_stride);
    params.p_rows = o_.places.dy, params.mask_rows = o_.places.mask;
    return params;
  }

  // dA_g = dS^T drop(X), dB_g = dY^T (s S), or partial sums of them
  LoraGroupedWgradParams<T> wgrad(const LoraGroupedBackward& g) const {
    LoraGroupedWgradParams<T> params{};
    const auto product = [&](const void* p, int64_t pitch, const int* rows, int64_t u, int64_t c,
                             int64_t partial) {
      const auto c_tiles = static_cast<int>((c + LoraWgradTile::kC - 1) / LoraWgradTile::kC);
      return LoraGroupedWgradProduct<T>{static_cast<const T*>(p), rows,    at<T>(u),
                                        at<float>(partial),       pitch,   plan_.columns,
                                        static_cast<int>(c),      c_tiles, false};
    };
    if (g.need_da)
      params.product[0] = product(o_.x, o_.x_pitch, places().x, weighted_t(g), o_.k, plan_.g_a);
    if (g.need_db)
      params.product[1] = product(g.dy, g.dy_pitch, places().dy, plan_.s, o_.n, plan_.g_b);
    params.product[0].masked = o_.dropout;
    params.gradients = gradients(g), params.factors = factors();
    params.pieces = tables_.pieces, params.mask_rows = places().mask;
    params.m = static_cast<int>(o_.m), params.max_rank = o_.rows.max_rank;
    params.lo_column = plan_.width, params.mask = o_.mask;
    return params;
  }
  LoraGroupedReduceWgradParams reduce_wgrad(const LoraGroupedBackward& g) const {
    LoraGroupedReduceWgradParams params{};
    params.gradient[0] = {at<float>(plan_.g_a), g.need_da ? static_cast<int>(o_.k) : 0,
                          o_.mask.keep_scale};
    params.gradient[1] = {at<float>(plan_.g_b), g.need_db ? static_cast<int>(o_.n) : 0, 1.f};
    params.gradients = gradients(g), params.factors = factors();
    params.sums = tables_.sums, params.max_rank = o_.rows.max_rank;
    return params;
  }

 private:
  template <class V>
  V* at(int64_t offset) const {
    return offset == plan::kNone ? nullptr : reinterpret_cast<V*>(o_.workspace + offset);
  }
  // T = dS as dA's sum has it.
  int64_t weighted_t(const LoraGroupedBackward& g) const {
    return g.need_da && g.row_weights.of != nullptr ? plan_.weighted_t : plan_.t;
  }
  // A pool may have no ranks; those of the tables are written for each.
  LoraGroupedFactors factors() const { return with_ranks(o_.factors.pool, entries()); }
  LoraGroupedFactors gradients(const LoraGroupedBackward& g) const {
    return with_ranks(g.gradients.pool, gradient_entries());
  }
  LoraGroupedFactors with_ranks(LoraGroupedFactors pool, const LoraGroupedEntry* entries) const {
    pool.entries = entries, pool.ranks = tables_.ranks;
    return pool;
  }
  // Where operands have the row of a position.
  LoraGroupedPlaces places() const {
    const int* order = tables_.order;
    return plan_.tables->own_weights() ? o_.places : LoraGroupedPlaces{order, order, order, order};
  }
  LoraGroupedShrinkParams<T> shrink_of(const void* x, int64_t pitch, int64_t k,
                                       const int* rows) const {
    LoraGroupedShrinkParams<T> params{};
    params.x = static_cast<const T*>(x), params.x_pitch = pitch, params.z = at<float>(plan_.z);
    params.m = static_cast<int>(o_.m), params.k = static_cast<int>(k);
    params.z_pitch = plan_.z_columns, params.max_rank = o_.rows.max_rank;
    params.terms = plan_.terms, params.steps_per_split = plan_.shrink.steps_per_split;
    params.tiles = tables_.tiles, params.factors = factors();
    params.rows = rows, params.mask_rows = places().mask;
    return params;
  }
  LoraGroupedReduced<T> reduced_to(int64_t t) const {
    T* hi = at<T>(t);
    return {at<float>(plan_.z),
            nullptr,
            nullptr,
            {hi, plan_.terms == 2 ? hi + plan_.width : nullptr},
            1.f,
            {}};
  }
  LoraGroupedReduceParams<T> reduce_of() const {
    LoraGroupedReduceParams<T> params{};
    params.scaling = o_.scaling, params.one_scaling = o_.one_scaling;
    params.t_pitch = plan_.columns, params.m = static_cast<int>(o_.m);
    params.splits = plan_.shrink.splits, params.terms = plan_.terms;
    params.z_pitch = plan_.z_columns, params.max_rank = o_.rows.max_rank;
    params.factors = factors();
    params.tiles = tables_.tiles, params.rows = places().y;
    return params;
  }
  LoraGroupedGemmParams<T> gemm_of(const void* p, int64_t pitch, int64_t n, int64_t k,
                                   void* y) const {
    LoraGroupedGemmParams<T> params{};
    params.gemm.p = static_cast<const T*>(p), params.gemm.p_pitch = pitch;
    params.gemm.q = static_cast<const T*>(o_.weight), params.gemm.q_pitch = o_.weight_pitch;
    params.gemm.y = static_cast<T*>(y), params.gemm.y_pitch = n;
    params.gemm.m = static_cast<int>(o_.m), params.gemm.n = static_cast<int>(n);
    params.gemm.k = plan_.base != plan::Base::kKernel ? 0 : static_cast<int>(k);
    params.gemm.whole_chunks = plan_.vector;
    params.t = o_.t != nullptr ? static_cast<const T*>(o_.t) : at<T>(plan_.t);
    params.gemm.t_pitch = plan_.columns, params.lo_column = plan_.width;
    params.factors = factors(), params.segments = tables_.segments;
    params.first = tables_.first, params.order = tables_.order;
    return params;
  }

  LoraOwnWeightsParams<T> own_weights_of(const LoraGroupedGemmParams<T>& many, const void* u,
                                         int64_t u_pitch, int64_t u_stride) const {
    LoraOwnWeightsParams<T> params{};
    params.gemm = many.gemm;
    params.gemm.low_rank[0] = {many.t, static_cast<const T*>(u)};
    params.gemm.u_pitch = u_pitch, params.u_stride = u_stride, params.width = plan_.width;
    params.gemm.rank = o_.rows.max_rank, params.gemm.terms = plan_.terms == 2 ? 3 : 1;
    params.q_stride = o_.weight_stride, params.y_rows = o_.places.y;
    params.q_rows = static_cast<int>(o_.weight_stride / std::max<int64_t>(1, o_.weight_pitch));
    params.first_expert = o_.first_weight, params.end_expert = o_.end_weight;
    params.row_tiles = tables_.row_tiles;
    params.row_tile_count = tables_.row_tile_count;
    return params;
  }

  const plan::Tiled& plan_;
  const LoraGroupedTables tables_;
  const LoraGroupedOperands& o_;
};

}  // namespace lora_ext::kernel
