// Copies B of some experts into a pool of the grouped op, and the gradient of a pool into that of
// B, on the CPU:
//
//     pool[i, n, j] = b[n, j E + e_i]        b [N, r E]: the expert is the fastest index
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext::cpu {

// Returns the pool [n, N, r] of the experts `hit` [n], int64; b is contiguous.
at::Tensor experts_gather(const at::Tensor& b, const at::Tensor& hit, int64_t experts);

// Writes a contiguous pool [n, N, r] in b's dtype into b.
void experts_scatter(const at::Tensor& b, const at::Tensor& hit, int64_t experts,
                     const at::Tensor& pool);

}  // namespace lora_ext::cpu
