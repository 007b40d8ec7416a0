// The operands of a planned LoRA linear with many adapters, as raw pointers.
//
//     forward    S = drop(X) A_g^T           Y  = X W^T + s_g S B_g^T + bias
//     backward   dS = s_g dY B_g             dX = dY W + mask * (dS A_g)
//                dA_g = dS^T drop(X)         dB_g = s_g dY^T S               over the rows of g
//
// The host does not need to know the values on the device: index or ends, ranks and scalings may
// change between replays of a graph, and adapters within their pool.
#pragma once

#include "kernel/lora_grouped.h"
#include "kernel/mask_operand.h"
#include "plan/plan.h"

namespace lora_ext::kernel {

// All factors, or all gradients of factors, in floats or in X's type: a pool, or a list that the
// host has. A gradient has the layout of its factor.
struct LoraGroupedMatrices {
  LoraGroupedFactors pool;       // its entries are null; has ranks also if these are gradients
  const LoraGroupedEntry* list;  // [groups], on the host; null for a pool
};

struct LoraGroupedOperands {
  int64_t m, n, k;
  LoraGroupedRows rows;
  const float* scaling;  // [groups], on the device
  LoraGroupedMatrices factors;
  bool float_adapters;
  const void *x, *weight;
  int64_t x_pitch, weight_pitch;
  bool dropout;
  Mask mask;  // of X, by original row; keep_scale is 1 without dropout
  unsigned char* workspace;
};

struct LoraGroupedForward : LoraGroupedOperands {
  const void* bias;  // [n], in float or X's type; may be null
  bool float_bias;
  const void* base;  // [m, n], onto which Y is added, in a plan for a given base; else null
  int64_t base_pitch;
  void* y;   // [m, n], contiguous; in a hybrid plan without X W^T
  float* s;  // [m, most_rank]; of a row only its rank's columns are written, without one none
  uint32_t* counts;  // as in LoraLinearForward
};

struct LoraGroupedBackward : LoraGroupedOperands {
  const void* dy;
  int64_t dy_pitch;
  const float* s;  // as forward has written it
  void* dx;        // [m, k], contiguous, or null; in a hybrid plan without dY W
  // All elements are written; in a pool those past a rank with zeros.
  LoraGroupedMatrices gradients;
  bool need_da, need_db;
};

}  // namespace lora_ext::kernel
