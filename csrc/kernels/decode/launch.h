// Launches lora_decode: its parameters from a plan, the operands and the workspace; then the
// instance that the plan names, and its grid.
#pragma once
#include "kernels/decode/kernel.h"
#include "kernels/decode/work.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel {

// Parameters that do not depend on whether there is one adapter or many; Forward is
// LoraLinearForward or LoraGroupedForward.
template <class T, class Forward>
LoraDecodeParams<T> decode_params(const plan::Decode& plan, const Forward& f) {
  const auto at = [&](int64_t offset) { return f.workspace + offset; };
  LoraDecodeParams<T> params{};
  params.x = static_cast<const T*>(f.x), params.x_pitch = f.x_pitch;
  params.w = static_cast<const T*>(f.weight), params.w_pitch = f.weight_pitch;
  params.bias = f.bias, params.float_bias = f.float_bias;
  params.y = static_cast<T*>(f.y), params.y_pitch = f.n, params.s = f.s;
  params.m = static_cast<int>(f.m), params.n = static_cast<int>(f.n);
  params.k = static_cast<int>(f.k);
  params.sums = reinterpret_cast<float*>(at(plan.sums));
  params.s_sums = reinterpret_cast<float*>(at(plan.s_sums));
  params.t = reinterpret_cast<T*>(at(plan.t));
  params.width = plan.width, params.t_pitch = plan.terms * plan.width;
  params.arrivals = f.counts != nullptr ? f.counts : reinterpret_cast<uint32_t*>(at(plan.flags));
  params.s_arrivals = params.arrivals + plan.tiles;
  params.s_tiles = params.s_arrivals + plan.s_tiles;
  return params;
}

// One adapter for all rows; its factors have unit stride along a row.
template <class T>
LoraDecodeParams<T> lora_decode_params(const plan::Decode& plan, const LoraLinearForward& f) {
  LoraDecodeParams<T> params = decode_params<T>(plan, f);
  params.groups = 1, params.max_rank = f.rank, params.scaling = f.scaling;
  params.factors.a = const_cast<void*>(f.a.data), params.factors.a_pitch = f.a.row_stride;
  params.factors.b = const_cast<void*>(f.b.data), params.factors.b_pitch = f.b.row_stride;
  return params;
}

// One adapter per row; the table of a list of adapters is at `entries`.
template <class T>
LoraDecodeParams<T> lora_decode_params(const plan::Decode& plan, const LoraGroupedForward& f,
                                       const LoraGroupedEntry* entries) {
  LoraDecodeParams<T> params = decode_params<T>(plan, f);
  params.index = f.rows.index, params.groups = f.rows.groups, params.max_rank = f.rows.max_rank;
  params.factors = f.factors.pool, params.factors.entries = entries;
  params.scalings = f.scaling;
  return params;
}

template <int kBatch>
constexpr bool is_as_planned_to_decode() {
  using Tile = LoraDecodeTile<kBatch>;
  constexpr plan::DecodeTile kPlanned = plan::decode_tile_for(kBatch);
  return kPlanned.batch == kBatch && kPlanned.rows == Tile::kRows &&
         kPlanned.shared == Tile::kSharedBytes && kPlanned.resident == Tile::kResident;
}
template <class T, class F, int kBatch>
constexpr bool has_pieces_as_planned() {
  constexpr bool kInFloat = std::is_same_v<F, float>;
  return LoraDecodeLowRank<T, F, LoraDecodeTile<kBatch>>::kPieces ==
         plan::decode_pieces(plan::decode_tile_for(kBatch), kInFloat);
}
static_assert(is_as_planned_to_decode<8>() && is_as_planned_to_decode<16>() &&
              is_as_planned_to_decode<32>() && is_as_planned_to_decode<64>());

// F is the type of the factors, float or T. A function of its own, so that kernels/launch/ compiles
// it once for all sequences. Workspace is not initialised, so arrival counts in it are cleared
// before.
template <class T, class F, class Launch>
void launch_lora_decode(const plan::Decode& plan, const LoraDecodeParams<T>& params, bool clear,
                        Launch& launch) {
  if (clear) launch.clear(params.arrivals, plan.flag_count());
  const auto run = [&](auto batch) {
    constexpr int kBatch = decltype(batch)::value;
    using Tile = LoraDecodeTile<kBatch>;
    static_assert(has_pieces_as_planned<T, F, kBatch>());
    launch(lora_decode_sm80<T, F, kBatch>, dim3(static_cast<unsigned>(plan.blocks)), Tile::kThreads,
           Tile::kSharedBytes, params);
  };
  switch (plan.batch) {
    case 8:
      return run(std::integral_constant<int, 8>());
    case 16:
      return run(std::integral_constant<int, 16>());
    case 32:
      return run(std::integral_constant<int, 32>());
    default:
      return run(std::integral_constant<int, 64>());
  }
}

}  // namespace lora_ext::kernel
