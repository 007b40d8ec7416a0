// Access to rows of X, Y and their gradients in the order of their adapters.
#pragma once
#include "kernel/lora_grouped.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

// Rows of a matrix, by position; past the last position there is none.
struct PositionedRows {
  static constexpr bool kInOrder = false;
  const int* order;  // as in LoraGroupedTables
  int m;
  __device__ __forceinline__ int operator()(int position) const {
    return order == nullptr || position >= m ? position : order[position];
  }
};

}  // namespace lora_ext::kernel
