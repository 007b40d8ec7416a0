// A call's operands as the skinny passes of cpu/skinny.h take them.
#pragma once

#include "common/call.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

inline Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

inline Dropout dropout_of(const DropoutArgs& args) {
  if (!args.enabled()) return {};
  return {static_cast<uint64_t>(*args.seed->const_data_ptr<int64_t>()), args.first_row(),
          args.first_col(), args.keep_count()};
}

// [rank, cols] as the kernels see it: lora_a directly, lora_b transposed.
inline AdapterView view_of(const at::Tensor& adapter, int64_t rank_dim) {
  return {adapter.const_data_ptr(), dtype_of(adapter.scalar_type()),
          adapter.stride(rank_dim), adapter.stride(1 - rank_dim),
          adapter.size(rank_dim),   adapter.size(1 - rank_dim)};
}

// Some ranks and columns of a factor, as a factor of its own.
inline AdapterView part_of(AdapterView view, const Range& ranks, const Range& cols) {
  const int64_t size = view.dtype == Dtype::kFloat32 ? 4 : 2;
  view.data = static_cast<const char*>(view.data) +
              (ranks.begin * view.rank_pitch + cols.begin * view.col_pitch) * size;
  view.rank = ranks.end - ranks.begin, view.cols = cols.end - cols.begin;
  return view;
}

}  // namespace lora_ext::cpu
