// Launches kernels in the execution layer.
#pragma once
#include "emulated/kernels/instance.h"
#include "emulator/emulator.h"
#include "kernels/gemm/sm90a/launch.h"
#include "kernels/tile/copy.h"

namespace kernels {

using lora_ext::kernel::Sm90aLaunch;

template <class V>
__global__ void clear(V* flags, int64_t count) {
  for (int64_t i = 0; i < count; ++i) flags[i] = 0;
}
INSTANCE(clear<uint32_t>(uint32_t*, int64_t))

// Launches as csrc/kernels/launch/ does, on a card that holds `most` clusters.
struct Launch {
  emulator::Stream& stream;
  int64_t most = 1;
  int pdl_launches = 0;

  template <class T>
  CUtensorMap encode(const T* data, int rows, int columns, int64_t pitch, int box_rows) {
    CUtensorMap map;
    const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(columns),
                                     static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch) * sizeof(T)};
    const cuuint32_t box[] = {128 / sizeof(T), static_cast<cuuint32_t>(box_rows)},
                     element_strides[] = {1, 1};
    const CUtensorMapDataType type = lora_ext::kernel::Element<T>::kTensorMap;
    const CUresult result = emulator::encode_tensor_map_tiled(
        &map, type, 2, const_cast<T*>(data), dimensions, strides, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error(emulator::tensor_map_error());
    return map;
  }

  template <class Kernel>
  int64_t clusters(Kernel, const Sm90aLaunch&) const {
    return most;
  }

  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params, bool use_pdl = false) {
    pdl_launches += use_pdl;
    stream.launch({.grid = grid,
                   .block = dim3(threads),
                   .shared_bytes = shared_bytes,
                   .programmatic_dependent = use_pdl},
                  kernel, params);
  }
  template <class... Params>
  void operator()(void (*kernel)(Params...), const Sm90aLaunch& config, const Params&... params) {
    pdl_launches += config.dependent;
    stream.launch({.grid = config.grid,
                   .block = dim3(config.threads),
                   .cluster = config.cluster,
                   .shared_bytes = config.shared_bytes,
                   .programmatic_dependent = config.dependent},
                  kernel, params...);
  }
  void clear(uint32_t* flags, int64_t count) {
    stream.launch({.grid = dim3(1), .block = dim3(1)}, kernels::clear<uint32_t>, flags, count);
  }
};

}  // namespace kernels
