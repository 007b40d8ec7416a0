// What surrounds the products of a mixture's experts on a device (lora_grouped.h): the order of the
// rows, the factors of all experts, and the sum over a token's slots with its gradients. Parameters
// of the kernels, and the function that launches them. Plain C++ without device code.
//
//     S = tokens k rows; the row at position p is of slot perm[p], which is of token perm[p] / k
//     expert e has the positions from offs[e - 1] to offs[e]; slots without an expert come last
//
// Rows and pools are halves, T; other numbers are T or floats. Pitches are in elements.
#pragma once
#include <cstdint>
#include <string>
#include <variant>

#include "common/dtype.h"
#include "kernels/lora_grouped.h"

namespace lora_ext::kernel {

// A stable sort by expert. A number that is no expert, such as -1, is that of a slot without one.
struct ExpertsRoutesParams {
  static constexpr int kChunk = 256;  // rows that a block counts

  const void* index;          // [rows], the expert of each slot
  bool is_long;               // the index is int64, not int32
  int *perm, *token, *place;  // [rows]; place, by slot, is the inverse of perm
  int* offs;                  // [experts]
  int* counts;                // [experts + 1, chunks], for the kernels alone
  LoraGroupedTables tables;   // of plan::experts_tables
  int adapters;               // numbers that share a W
  int rows, slots, experts;   // slots: k, of each token
};

// One adapter's factors, in PEFT's layout, as ranks [first, first + ranks) of two pools. With two
// terms a pool has hi of its `width` ranks, then lo (tile/halves.h):
//
//     pool_a[g, first + j, :] = lora_a[e r + j, :]                      g = e groups + group
//     pool_b[g, c, first + j] = scale * lora_b[c, j experts + e]        zeros from j = r on
//
// For few rows, with one g for each e, A is read as it is, in the place of pool_a:
//
//     S[:, first + j] = x lora_a[e r + j, :]        T = t_scale * S, as halves in its two terms
struct ExpertsFactorsParams {
  const void *lora_a, *lora_b;  // [experts r, in] and [out, r experts]
  bool a_in_float, b_in_float;
  void *pool_a, *pool_b;  // of each g [terms width, in] and [out, terms width]
  const int* offs;        // a g without rows is left out; null: none is
  int experts, rank, in, out;
  int terms, width, first, ranks;  // ranks >= r
  int groups, group;               // of an expert's g this one's: 1 and 0 if all rows have it
  float scale;
  const void* x;  // of few rows; null: pool_a is written
  int64_t x_pitch;
  const int* x_rows;  // [rows], the row of x at each position; null: its own number
  float* s;           // [rows, s_pitch]
  void* t;            // [rows, terms width]
  int rows, s_pitch;
  float t_scale;
};

// out[t] = sum over t's slots of weight * row, in the slots' order, in float32 and rounded once. A
// slot without an expert adds nothing.
struct ExpertsSumParams {
  const void* rows;     // [rows, n] by position
  const int* place;     // [tokens k]
  const int* count;     // one number: the positions that have an expert
  const void* weights;  // [tokens k]; null for 1
  bool weights_in_float;
  void* out;  // [tokens, n]
  int64_t pitch;
  int tokens, slots, n;
};

// The gradient of a weight, <x, dx'> + <grad, bias>, where dx' is dx but for the weight; and
// dx = weight * dx', in place, rounded once more. Where a slot has no expert the gradient is 0, and
// dx stays.
struct ExpertsDotParams {
  const void* x;           // [rows, n] by position
  void* dx;                // [rows, n] by position
  const int *perm, *offs;  // [rows] and [experts]
  const void* weights;     // [rows] by slot
  void* dweights;          // as weights
  bool weights_in_float;
  const void *grad, *bias;  // [tokens, bias_n] and [experts, bias_n], or null
  int64_t x_pitch, dx_pitch, grad_pitch, bias_pitch;
  int rows, slots, experts, n, bias_n;
};

using ExpertsParams =
    std::variant<ExpertsRoutesParams, ExpertsFactorsParams, ExpertsSumParams, ExpertsDotParams>;

}  // namespace lora_ext::kernel

namespace lora_ext::cuda {

// Launches on `stream` of the current device, without synchronising with the host; there is at
// least one row. The dtype is T's. Returns "" or the error of a launch.
std::string launch_experts(Dtype dtype, const kernel::ExpertsParams& params, void* stream);

}  // namespace lora_ext::cuda
