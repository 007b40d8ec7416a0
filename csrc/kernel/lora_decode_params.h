// Parameters of lora_decode, from a plan (plan::Decode), the operands and the workspace.
#pragma once
#include "kernel/lora_decode.h"
#include "kernel/lora_grouped_linear.h"
#include "kernel/lora_linear.h"

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
  params.groups = 1, params.most_rank = f.rank, params.scaling = f.scaling;
  params.factors.a = const_cast<void*>(f.a.data), params.factors.a_pitch = f.a.row_stride;
  params.factors.b = const_cast<void*>(f.b.data), params.factors.b_pitch = f.b.row_stride;
  return params;
}

// One adapter per row; the table of a list of adapters is at `entries`.
template <class T>
LoraDecodeParams<T> lora_decode_params(const plan::Decode& plan, const LoraGroupedForward& f,
                                       const LoraGroupedEntry* entries) {
  LoraDecodeParams<T> params = decode_params<T>(plan, f);
  params.index = f.rows.index, params.groups = f.rows.groups, params.most_rank = f.rows.most_rank;
  params.factors = f.factors.pool, params.factors.entries = entries;
  params.scalings = f.scaling;
  return params;
}

}  // namespace lora_ext::kernel
