// B of some experts as a pool of the grouped op, and a pool's gradient as B's, on the CPU:
//
//     pool[i, n, j] = b[n, j E + e_i]        b [N, r E], whose fastest index is the expert
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext::cpu {

// Pool [n, N, r] of the experts hit [n], int64; b is contiguous.
at::Tensor experts_gather(const at::Tensor& b, const at::Tensor& hit, int64_t experts);

// Writes a contiguous pool [n, N, r] of b's dtype into b.
void experts_scatter(const at::Tensor& b, const at::Tensor& hit, int64_t experts,
                     const at::Tensor& pool);

}  // namespace lora_ext::cpu
