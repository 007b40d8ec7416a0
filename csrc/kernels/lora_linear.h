// The LoRA linear on a device: its operands as raw pointers, and the function that launches a plan.
//
//     forward    S = drop(X) A^T            Y  = X W^T + s S B^T + bias
//     backward   dS = s dY B                dX = dY W + mask * (dS A)
//                dA = dS^T drop(X)          dB = s dY^T S
//
// Plain C++ without device code: the op includes it in builds without CUDA, too.
#pragma once
#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/philox.h"
#include "kernels/plan/plan.h"

namespace lora_ext::kernel {

struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// Operands of forward and backward, with one adapter or with many. Adapters are in float or, like
// everything else, in T.
struct LoraOperands {
  int64_t m, n, k;
  const void *x, *weight;
  int64_t x_pitch, weight_pitch;
  bool float_adapters;
  bool dropout;
  Mask mask;  // of X, by row of the call; keep_scale is 1 without dropout
  unsigned char* workspace;
};

struct ForwardOperands {
  const void* bias;  // [n], in float or T; may be null
  bool float_bias;
  const void* base;  // [m, n], onto which Y is added, in a plan for a given base; else null
  int64_t base_pitch;
  void* y;   // [m, n], contiguous; in a hybrid plan without X W^T
  float* s;  // [m, rank]; with many adapters a row has as many columns as its adapter's rank
  // For lora_decode: as many zeros as the plan has flags; null if they are in the workspace.
  uint32_t* counts;
};

struct BackwardOperands {
  const void* dy;
  int64_t dy_pitch;
  const float* s;  // as forward has written it
  void* dx;        // [m, k], contiguous, or null; in a hybrid plan without dY W
};

struct LoraLinearOperands : LoraOperands {
  Matrix a, b;
  int rank;
  float scaling;
};
struct LoraLinearForward : LoraLinearOperands, ForwardOperands {};
struct LoraLinearBackward : LoraLinearOperands, BackwardOperands {
  void *da, *db;  // [rank, k] and [n, rank], in the adapters' type; or null
};

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Operands: LoraLinearForward or -Backward, LoraGroupedForward or -Backward; dtype: kBFloat16 or
// kFloat16. Asynchronous on `stream` of the current device. Returns "" or the error of a launch.
template <class Operands>
std::string launch_lora(Dtype dtype, const plan::Plan& plan, const Operands& operands,
                        void* stream);

}  // namespace lora_ext::cuda
