// What lora_gemm_in_grid_sm90a takes beside LoraGemmParams: for those who launch it without its
// source.
#pragma once
#include <cstdint>

#include "kernel/lora_gemm.h"

namespace lora_ext::kernel {

// What makes T = scaling P A beside the product: A lies as Q does, T is low_rank[0].t.
template <class T>
struct LoraInGridParams {
  T* t;      // [m, width], columns past the rank become zero
  float* s;  // [m, rank]: P A in float; or null
  int64_t t_pitch;
  int width;  // whole 16-byte chunks
  float scaling;
  int pairs_per_ticket;  // pairs of row blocks of T that a cluster makes at a time

  // Zero at launch. How many consumers have written their rows of a row block of T: all of T is
  // there at parts_of_t.
  uint32_t* written;  // [1]
  // All zero at launch, and again after it, so that the replay of a graph finds them so.
  uint32_t* ticket;    // [1], the next job
  uint32_t* finished;  // [1], clusters that have left
  uint32_t* ready;     // [2 row pairs], consumers that have written their rows of a row block of T
};

// Two consumers write each row block.
constexpr uint32_t parts_of_t(int64_t row_blocks) { return static_cast<uint32_t>(2 * row_blocks); }

// A of T = scaling P A, as Q lies: [rank, k], or MN-major [k, rank].
template <class T>
struct InGridFactor {
  const T* a;
  int64_t pitch;
};

}  // namespace lora_ext::kernel
