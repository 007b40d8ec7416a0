// Conformance cases of wgmma: d[64, N] = c + a[64, 64] b[64, N] in four steps of 16 along k, for
// each operand source, major dimension, swizzle and format.
#pragma once

#include "emulator/conformance/cases_tma.h"
#include "ptx/wgmma.h"

namespace conformance {

constexpr uint32_t kTileK = 64, kTileM = 64;

// An operand tile of [rows, kTileK] elements in shared memory: boxes side by side, each as wide as
// the swizzle. K-major, a box has `rows` lines of consecutive k; MN-major, kTileK lines of
// consecutive rows.
struct OperandTile {
  uint32_t rows;
  ptx::Major major;
  ptx::Swizzle swizzle;

  __host__ __device__ uint32_t width() const { return 16u << static_cast<uint32_t>(swizzle); }
  __host__ __device__ bool k_major() const { return major == ptx::Major::kK; }
  __host__ __device__ bool plain() const { return swizzle == ptx::Swizzle::kNone; }
  __host__ __device__ uint32_t lines() const { return k_major() ? rows : kTileK; }
  __host__ __device__ uint32_t box_bytes() const { return lines() * width(); }
  __host__ __device__ uint32_t boxes() const { return (k_major() ? kTileK : rows) * 2 / width(); }
  __host__ __device__ uint32_t bytes() const { return rows * kTileK * 2; }

  // Descriptor of the 16 columns of `step`. Without swizzle the two offsets exchange their roles
  // with the major dimension ("Strides" of the matrix descriptor).
  __device__ uint64_t descriptor(uint32_t tile, uint32_t step) const {
    uint32_t leading = box_bytes(), stride = 8 * width(), start = 0;
    if (k_major()) {
      const uint32_t byte = step * 32;
      start = byte / width() * box_bytes() + byte % width();
    } else {
      start = step * 16 * width();
      if (plain()) {
        leading = 8 * width();
        stride = box_bytes();
      }
    }
    return ptx::matrix_descriptor(tile + start, leading, stride, swizzle);
  }
};

__device__ inline void load_operand(const OperandTile& tile, uint32_t address,
                                    const CUtensorMap* map, uint32_t bar) {
  for (uint32_t box = 0; box < tile.boxes(); ++box) {
    const int x = static_cast<int>(box * tile.width() / 2);
    ptx::tma_load_2d(address + box * tile.box_bytes(), map, bar, x, 0);
  }
}

template <typename T, int N, ptx::Major kMajorA, ptx::Major kMajorB>
__global__ void __launch_bounds__(128)
    multiply_wgmma(const __grid_constant__ CUtensorMap map_a,
                   const __grid_constant__ CUtensorMap map_b, ptx::Swizzle swizzle, const float* c,
                   float* d) {
  const OperandTile tile_a{kTileM, kMajorA, swizzle}, tile_b{N, kMajorB, swizzle};
  const uint32_t shared_a = ptx::shared_address(ptx::dynamic_shared_memory());
  const uint32_t shared_b = shared_a + tile_a.bytes(), bar = shared_b + tile_b.bytes();
  init_mbarrier(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, tile_a.bytes() + tile_b.bytes());
    load_operand(tile_a, shared_a, &map_a, bar);
    load_operand(tile_b, shared_b, &map_b, bar);
  }
  // Register i of a thread is in row `row(i)` and column `column(i)` of d.
  const uint32_t first_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4,
                 pair = 2 * (threadIdx.x % 4);
  const auto place = [&](uint32_t i) {
    return (first_row + i / 2 % 2 * 8) * N + i / 4 * 8 + pair + i % 2;
  };
  float accumulators[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) accumulators[i] = c[place(i)];
  ptx::mbarrier_wait(bar, 0);
  ptx::wgmma_pin(accumulators);
  ptx::wgmma_fence();
#pragma unroll
  for (uint32_t step = 0; step < 4; ++step) {
    ptx::wgmma_ss<T, N, kMajorA, kMajorB>(accumulators, tile_a.descriptor(shared_a, step),
                                          tile_b.descriptor(shared_b, step), true);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(accumulators);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[place(i)] = accumulators[i];
}

// A matrix [rows, kTileK] in memory order, for TMA.
inline std::vector<uint16_t> stored(const std::vector<uint16_t>& matrix, const OperandTile& tile) {
  if (tile.k_major()) return matrix;
  std::vector<uint16_t> transposed(matrix.size());
  for (uint32_t row = 0; row < tile.rows; ++row) {
    for (uint32_t k = 0; k < kTileK; ++k) {
      transposed[k * tile.rows + row] = matrix[row * kTileK + k];
    }
  }
  return transposed;
}

inline CUtensorMap operand_map(DeviceArray<uint16_t>& memory, const OperandTile& tile) {
  const uint32_t length = tile.k_major() ? kTileK : tile.rows;
  return tensor_map(memory.data(), {tile.lines(), length, length}, {tile.lines(), tile.width() / 2},
                    static_cast<CUtensorMapSwizzle>(tile.swizzle));
}

template <typename T, int N, ptx::Major kMajorA, ptx::Major kMajorB>
void case_wgmma(Recorder& recorder, ptx::Swizzle swizzle = ptx::Swizzle::k128,
                bool integers = true) {
  const auto letter = [](ptx::Major major) { return major == ptx::Major::kK ? "k" : "mn"; };
  const std::string name = std::string("wgmma_ss_") + FormatOf<T>::kName + "_n" +
                           std::to_string(N) + "_" + letter(kMajorA) + "_" + letter(kMajorB) + "_" +
                           swizzle_name(static_cast<CUtensorMapSwizzle>(swizzle)) +
                           (integers ? "_integers" : "");
  Random random = recorder.begin(
      name, {"wgmma_ss", "wgmma_fence", "wgmma_pin", "wgmma_commit_group", "wgmma_wait_group"},
      integers ? Comparison::kExact : Comparison::kProduct);
  const OperandTile tile_a{kTileM, kMajorA, swizzle}, tile_b{N, kMajorB, swizzle};
  const auto a = operand<T>(random, kTileM * kTileK, integers);
  const auto b = operand<T>(random, N * kTileK, integers);
  recorder.input("a", a, {kTileM, kTileK});
  recorder.input("b_transposed", b, {N, kTileK});
  auto c = recorder.input("c", addends(random, kTileM * N, integers), {kTileM, N});
  DeviceArray<uint16_t> memory_a(stored(a, tile_a)), memory_b(stored(b, tile_b));
  DeviceArray<float> d(kTileM * N);
  launch({1, 128, tile_a.bytes() + tile_b.bytes() + 8}, multiply_wgmma<T, N, kMajorA, kMajorB>,
         operand_map(memory_a, tile_a), operand_map(memory_b, tile_b), swizzle, c.data(), d.data());
  recorder.output("d", d, {kTileM, N});
}

// Small integers show the layouts bit by bit, for every combination; other numbers show the
// rounding.
template <typename T>
void record_wgmma_of(Recorder& recorder) {
  constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  for (ptx::Swizzle swizzle :
       {ptx::Swizzle::kNone, ptx::Swizzle::k32, ptx::Swizzle::k64, ptx::Swizzle::k128}) {
    case_wgmma<T, 64, kK, kK>(recorder, swizzle);
    case_wgmma<T, 64, kK, kMN>(recorder, swizzle);
    case_wgmma<T, 64, kMN, kK>(recorder, swizzle);
    case_wgmma<T, 64, kMN, kMN>(recorder, swizzle);
  }
  case_wgmma<T, 192, kK, kMN>(recorder);
  case_wgmma<T, 256, kMN, kMN>(recorder);
  case_wgmma<T, 64, kK, kK>(recorder, ptx::Swizzle::k128, false);
  case_wgmma<T, 64, kK, kMN>(recorder, ptx::Swizzle::k128, false);
}

inline void record_wgmma(Recorder& recorder) {
  record_wgmma_of<__nv_bfloat16>(recorder);
  record_wgmma_of<__half>(recorder);
}

}  // namespace conformance
