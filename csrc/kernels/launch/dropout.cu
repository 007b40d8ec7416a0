// Dropout apart from products on CUDA: one Philox call and eight elements of a row per thread.
//
//     out[m, c] = kept(seed, row_offset + m, col_offset + c) ? keep_scale * x[m, c] : 0
//
// or with row mask_rows[m] of the mask, for rows that are not where their masks are.
//
// Memory-bound: 2 * sizeof(T) bytes per element. Threads of a warp take consecutive groups, which
// own column pairs 8 apart among 32 columns, so a warp covers 256 consecutive columns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/philox.h"
#include "kernels/dropout.h"
#include "kernels/launch/driver.h"

namespace lora_ext::cuda {
namespace {

template <class T>
__device__ void write(const DropoutParams& params, int64_t m, int64_t c, bool kept) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T x = static_cast<const T*>(params.x)[m * params.x_pitch + c];
  const Sum value = static_cast<Sum>(x) * static_cast<Sum>(params.keep_scale);
  static_cast<T*>(params.out)[m * params.out_pitch + c] = static_cast<T>(kept ? value : Sum{0});
}

template <>
__device__ void write<bool>(const DropoutParams& params, int64_t m, int64_t c, bool kept) {
  static_cast<bool*>(params.out)[m * params.out_pitch + c] = kept;
}

template <class T>
__global__ void __launch_bounds__(256) dropout_kernel(const DropoutParams params) {
  const int64_t first_group = params.col_offset / 32 * 4;
  const int64_t num_groups = ((params.col_offset + params.cols + 31) / 32 * 4) - first_group;
  const int64_t total = params.rows * num_groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const uint64_t seed = static_cast<uint64_t>(*params.seed);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t m = i / num_groups;
    const int64_t group = first_group + i % num_groups;
    const int64_t row = params.row_offset + (params.mask_rows == nullptr ? m : params.mask_rows[m]);
    const philox::Words words =
        philox::draw(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(group));
    const int64_t first_col = group / 4 * 32 + group % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t col = first_col + j / 2 * 8 + j % 2;
      const int64_t c = col - params.col_offset;
      if (c < 0 || c >= params.cols) continue;
      const bool kept = ((words.w[j / 2] >> (j % 2 * 16)) & 0xFFFFu) < params.keep_count;
      write<T>(params, m, c, kept);
    }
  }
}

template <class T>
std::string launch(const DropoutParams& params, void* stream) {
  constexpr int64_t kThreads = 256;
  constexpr int64_t kMaxBlocks = 132 * 16;  // grid-stride beyond that
  const int64_t groups = params.rows * ((params.cols + 31) / 32 * 4 + 4);
  const int64_t blocks = (groups + kThreads - 1) / kThreads;
  if (params.rows == 0 || params.cols == 0) return "";
  // Only its own return value is that of this launch; cudaGetLastError may report an older error.
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  launch.blockDim = dim3(kThreads), launch.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&launch, dropout_kernel<T>, params));
}

}  // namespace

std::string launch_dropout(Dtype dtype, const DropoutParams& params, void* stream) {
  std::string error = text_of(cudaErrorInvalidValue);
  with_type<double, float, __nv_bfloat16, __half, bool>(
      dtype, [&](auto type) { error = launch<typename decltype(type)::type>(params, stream); });
  return error;
}

}  // namespace lora_ext::cuda
