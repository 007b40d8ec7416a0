// Dropout apart from products on CUDA: one Philox call and eight elements of a row per thread.
//
//     out[m, c] = kept(seed, row_offset + m, col_offset + c) ? keep_scale * x[m, c] : 0
//
// or with row mask_rows[m] of the mask, for rows that are not where their masks are.
//
// Memory-bound: 2 * sizeof(T) bytes per element. Threads of a warp take consecutive groups, which
// own column pairs 8 apart among 32 columns, so a warp covers 256 consecutive columns. Where pairs
// are aligned, a thread loads its four at once and stores them as such.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/philox.h"
#include "kernels/dropout.h"
#include "kernels/launch/driver.h"
#include "kernels/tile/mask.h"

namespace lora_ext::cuda {
namespace {

// Two neighbouring elements, which one instruction loads or stores.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T of[2];
};

template <class T>
bool in_pairs(const DropoutParams& params) {
  const auto places =
      reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.out);
  return (places % sizeof(Pair<T>) | params.col_offset % 2 | params.out_pitch % 2) == 0 &&
         (params.x == nullptr || params.x_pitch % 2 == 0);
}

// A row of x and of out.
template <class T>
struct DropoutRow {
  const T* x;
  T* out;

  __device__ __forceinline__ T load(int64_t c) const { return x[c]; }
  __device__ __forceinline__ Pair<T> load_pair(int64_t c) const {
    return *reinterpret_cast<const Pair<T>*>(x + c);
  }
  __device__ __forceinline__ static T dropped(T x, bool kept, double keep_scale) {
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
    return static_cast<T>(kept ? static_cast<Sum>(x) * static_cast<Sum>(keep_scale) : Sum{0});
  }
};

// Of the mask alone x is not read.
template <>
struct DropoutRow<bool> {
  const bool* x;
  bool* out;

  __device__ __forceinline__ bool load(int64_t) const { return true; }
  __device__ __forceinline__ Pair<bool> load_pair(int64_t) const { return {}; }
  __device__ __forceinline__ static bool dropped(bool, bool kept, double) { return kept; }
};

__device__ __forceinline__ bool is_kept(const philox::Words& words, int j, uint32_t keep_count) {
  return ((words.w[j / 2] >> (j % 2 * 16)) & 0xFFFFu) < keep_count;
}

// `pairs`: see in_pairs.
template <class T>
__global__ void __launch_bounds__(256) dropout_kernel(const DropoutParams params, bool pairs) {
  const int64_t first_group = params.col_offset / 32 * 4;
  const auto num_groups =
      static_cast<uint32_t>((params.col_offset + params.cols + 31) / 32 * 4 - first_group);
  const uint32_t step = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t step_rows = step / num_groups, step_groups = step % num_groups;
  const uint64_t seed = static_cast<uint64_t>(*params.seed);
  uint32_t of_row = first % num_groups;
  for (int64_t m = first / num_groups; m < params.rows; m += step_rows) {
    const int64_t group = first_group + of_row;
    const int64_t row = params.row_offset + (params.mask_rows == nullptr ? m : params.mask_rows[m]);
    const philox::Words words =
        kernel::draw_words(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(group));
    const DropoutRow<T> at{static_cast<const T*>(params.x) + m * params.x_pitch,
                           static_cast<T*>(params.out) + m * params.out_pitch};
    const int64_t first_c = group / 4 * 32 + group % 4 * 2 - params.col_offset;
    if (pairs && first_c >= 0 && first_c + 25 < params.cols) {
      Pair<T> values[4];  // all loads before the first store, which x may alias
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = at.load_pair(first_c + j * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        T& value = values[j / 2].of[j % 2];
        value = at.dropped(value, is_kept(words, j, params.keep_count), params.keep_scale);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) *reinterpret_cast<Pair<T>*>(at.out + first_c + j * 8) = values[j];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int64_t c = first_c + j / 2 * 8 + j % 2;
        if (c < 0 || c >= params.cols) continue;
        at.out[c] = at.dropped(at.load(c), is_kept(words, j, params.keep_count), params.keep_scale);
      }
    }
    of_row += step_groups;
    if (of_row >= num_groups) of_row -= num_groups, ++m;
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
  return text_of(cudaLaunchKernelEx(&launch, dropout_kernel<T>, params, in_pairs<T>(params)));
}

}  // namespace

std::string launch_dropout(Dtype dtype, const DropoutParams& params, void* stream) {
  std::string error = text_of(cudaErrorInvalidValue);
  with_type<double, float, __nv_bfloat16, __half, bool>(
      dtype, [&](auto type) { error = launch<typename decltype(type)::type>(params, stream); });
  return error;
}

}  // namespace lora_ext::cuda
