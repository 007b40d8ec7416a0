// Conformance cases of TMA: the layout in shared memory under each swizzle, and what is written
// back.
#pragma once

#include "emulator/conformance/cases_sm90.h"
#include "ptx/tma.h"

namespace conformance {

constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                            CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};

// A row-major tensor [height, width] of 16-bit elements with a pitch of `pitch` elements, copied in
// boxes.
struct Tensor {
  uint32_t height, width, pitch;
};
struct Box {
  uint32_t height, width;
  uint32_t bytes() const { return height * width * 2; }
};

inline CUtensorMap tensor_map(uint16_t* base, const Tensor& tensor, const Box& box,
                              CUtensorMapSwizzle swizzle) {
  const cuuint64_t dims[] = {tensor.width, tensor.height}, pitches[] = {tensor.pitch * 2};
  const cuuint32_t box_dims[] = {box.width, box.height}, strides[] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encode_tensor_map(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, base, dims, pitches, box_dims,
                        strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::fprintf(stderr, "cuTensorMapEncodeTiled: error %d\n", static_cast<int>(status));
    std::exit(2);
  }
  return map;
}

// Loads one box and returns its raw bytes.
__global__ void load_box(const __grid_constant__ CUtensorMap map, int x, int y, uint32_t bytes,
                         unsigned char* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t tile = ptx::shared_address(shared), bar = tile + bytes;
  if (threadIdx.x == 0) ptx::prefetch_tensor_map(&map);
  init_mbarrier(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    ptx::tma_load_2d(tile, &map, bar, x, y);
  }
  ptx::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = shared[i];
}

inline std::string swizzle_name(CUtensorMapSwizzle swizzle) {
  constexpr const char* kNames[] = {"none", "32", "64", "128"};
  return kNames[static_cast<int>(swizzle)];
}
inline Box box_of(CUtensorMapSwizzle swizzle) {
  return {24, 8u << static_cast<uint32_t>(swizzle)};  // rows as wide as the swizzle
}

// Boxes inside the tensor, across each edge and outside.
inline void case_tma_load(Recorder& recorder, CUtensorMapSwizzle swizzle) {
  Random random = recorder.begin("tma_load_2d_" + swizzle_name(swizzle),
                                 {"tma_load_2d", "prefetch_tensor_map", "mbarrier_arrive_expect_tx",
                                  "mbarrier_wait", "fence_mbarrier_init"});
  const Tensor tensor{45, 77, 80};
  const Box box = box_of(swizzle);
  auto in = recorder.input("in", random.integers<uint16_t>(tensor.height * tensor.pitch),
                           {tensor.height, tensor.pitch});
  const CUtensorMap map = tensor_map(in.data(), tensor, box, swizzle);
  const int corners[][2] = {{0, 0}, {8, 16}, {-8, -3}, {56, 30}, {72, -7}, {104, 3}};
  for (const auto& [x, y] : corners) {
    DeviceArray<uint8_t> out(box.bytes());
    launch({1, 64, box.bytes() + 8}, load_box, map, x, y, box.bytes(), out.data());
    recorder.output("box_" + std::to_string(x) + "_" + std::to_string(y), out);
  }
}

// A tensor smaller than the box in both dimensions, as a rank below 64 or few rows make it: loaded,
// and the box then stored to another.
__global__ void load_and_store_box(const __grid_constant__ CUtensorMap from,
                                   const __grid_constant__ CUtensorMap to, uint32_t bytes,
                                   unsigned char* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t tile = ptx::shared_address(shared), bar = tile + bytes;
  init_mbarrier(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    ptx::tma_load_2d(tile, &from, bar, 0, 0);
  }
  ptx::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = shared[i];
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&to, tile, 0, 0);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
  }
}

inline void case_tma_small_tensor(Recorder& recorder) {
  Random random = recorder.begin("tma_box_beyond_tensor", {"tma_load_2d", "tma_store_2d"});
  const Tensor tensor{5, 8, 8};
  const Box box{128, 64};
  auto in = recorder.input("in", random.integers<uint16_t>(tensor.height * tensor.pitch),
                           {tensor.height, tensor.pitch});
  DeviceArray<uint16_t> stored(tensor.height * tensor.pitch);
  DeviceArray<uint8_t> out(box.bytes());
  const CUtensorMap from = tensor_map(in.data(), tensor, box, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap to = tensor_map(stored.data(), tensor, box, CU_TENSOR_MAP_SWIZZLE_128B);
  launch({1, 64, box.bytes() + 8}, load_and_store_box, from, to, box.bytes(), out.data());
  recorder.output("box", out);
  recorder.output("stored", stored, {tensor.height, tensor.pitch});
}

// Each block of the pair loads half of the rows into both.
__global__ void load_multicast(const __grid_constant__ CUtensorMap map, uint32_t bytes, int rows,
                               unsigned char* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t tile = ptx::shared_address(shared), bar = tile + 2 * bytes;
  const uint32_t rank = ptx::cluster_rank();
  init_mbarrier(bar, 1);
  synchronize_cluster();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, 2 * bytes);
    ptx::tma_load_2d_multicast(tile + rank * bytes, &map, bar, 0, static_cast<int>(rank) * rows, 3);
  }
  ptx::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < 2 * bytes; i += blockDim.x) {
    out[blockIdx.x * 2 * bytes + i] = shared[i];
  }
  synchronize_cluster();
}

inline void case_tma_multicast(Recorder& recorder) {
  Random random = recorder.begin("tma_load_2d_multicast", {"tma_load_2d_multicast"});
  const Tensor tensor{30, 64, 64};
  const Box box{16, 64};
  auto in = recorder.input("in", random.integers<uint16_t>(tensor.height * tensor.pitch),
                           {tensor.height, tensor.pitch});
  const CUtensorMap map = tensor_map(in.data(), tensor, box, CU_TENSOR_MAP_SWIZZLE_128B);
  DeviceArray<uint8_t> out(4 * box.bytes());
  launch({2, 64, 2 * box.bytes() + 8, 2}, load_multicast, map, box.bytes(), 16, out.data());
  recorder.output("out", out, {2, 2 * box.bytes()});
}

// Stores raw bytes as one box, then, changed, as another.
__global__ void store_boxes(const __grid_constant__ CUtensorMap map, const unsigned char* in,
                            uint32_t bytes, int x, int y, int step) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t tile = ptx::shared_address(shared);
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) ptx::bulk_wait_group_read<0>();
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) shared[i] = in[round * bytes + i];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store_2d(&map, tile, x + round * step, y);
      ptx::bulk_commit_group();
    }
  }
  if (threadIdx.x == 0) ptx::bulk_wait_group<0>();
}

inline void case_tma_store(Recorder& recorder, CUtensorMapSwizzle swizzle) {
  Random random = recorder.begin("tma_store_2d_" + swizzle_name(swizzle),
                                 {"tma_store_2d", "bulk_commit_group", "bulk_wait_group",
                                  "bulk_wait_group_read", "fence_proxy_async_shared"});
  const Tensor tensor{45, 139, 144};
  const Box box = box_of(swizzle);
  auto in = recorder.input("in", random.integers<uint8_t>(2 * box.bytes()));
  DeviceArray<uint16_t> out(std::vector<uint16_t>(tensor.height * tensor.pitch, 0xCDCD));
  const CUtensorMap map = tensor_map(out.data(), tensor, box, swizzle);
  launch({1, 64, box.bytes()}, store_boxes, map, in.data(), box.bytes(), 136, 30, -144);
  recorder.output("out", out, {tensor.height, tensor.pitch});
}

// Threads write a tile to global memory, TMA reads it back in the same kernel.
__global__ void write_then_load(const __grid_constant__ CUtensorMap map, const uint16_t* in,
                                uint16_t* tensor, uint32_t count, uint16_t* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t tile = ptx::shared_address(shared), bar = tile + 2 * count;
  init_mbarrier(bar, 1);
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) tensor[i] = in[i];
  ptx::fence_proxy_async_global();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, 2 * count);
    ptx::tma_load_2d(tile, &map, bar, 0, 0);
  }
  ptx::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = reinterpret_cast<const uint16_t*>(shared)[i];
  }
}

inline void case_proxy_global(Recorder& recorder) {
  Random random = recorder.begin("proxy_global", {"fence_proxy_async_global", "tma_load_2d"});
  const Tensor shape{32, 64, 64};
  auto in = recorder.input("in", random.integers<uint16_t>(32 * 64));
  DeviceArray<uint16_t> tensor(32 * 64), out(32 * 64);
  const CUtensorMap map = tensor_map(tensor.data(), shape, {32, 64}, CU_TENSOR_MAP_SWIZZLE_NONE);
  launch({1, 128, 2 * 32 * 64 + 8}, write_then_load, map, in.data(), tensor.data(), 32u * 64u,
         out.data());
  recorder.output("out", out);
}

inline void record_tma(Recorder& recorder) {
  case_tma_small_tensor(recorder);
  for (CUtensorMapSwizzle swizzle : kSwizzles) case_tma_load(recorder, swizzle);
  case_tma_multicast(recorder);
  for (CUtensorMapSwizzle swizzle : kSwizzles) case_tma_store(recorder, swizzle);
  case_proxy_global(recorder);
}

}  // namespace conformance
