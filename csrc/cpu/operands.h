// Converts the operands of a call to those of the skinny passes in cpu/skinny.h.
#pragma once

#include "common/call.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

inline Dropout dropout_of(const DropoutArgs& args) {
  if (!args.enabled()) return {};
  return {static_cast<uint64_t>(*args.seed->const_data_ptr<int64_t>()), args.first_row(),
          args.first_col(), args.keep_count()};
}

// A factor as [rank, cols] for the kernels: lora_a directly, lora_b transposed.
inline AdapterView view_of(const at::Tensor& adapter, int64_t rank_dim) {
  return {adapter.const_data_ptr(), dtype_of(adapter.scalar_type()),
          adapter.stride(rank_dim), adapter.stride(1 - rank_dim),
          adapter.size(rank_dim),   adapter.size(1 - rank_dim)};
}

// t = scale * drop(p) Q for the adapter view Q, packed as `panel`, or null for few rows.
inline ShrinkArgs shrink_args(const at::Tensor& p, const AdapterView& q, const void* panel,
                              double scale, float* t, const Dropout& dropout, RowIndex rows = {}) {
  return {
      p.const_data_ptr(),          dtype_of(p.scalar_type()), p.stride(0), q.cols,  q.rank, panel,
      q.dtype == Dtype::kBFloat16, static_cast<float>(scale), t,           dropout, rows};
}

}  // namespace lora_ext::cpu
