// lora_dsdb: dS and the gradient of B in one pass over dY.
//
//     Z[panel]   = dY B            over the panel's kN columns of dY         [m, columns]
//     G[split]^T = dY^T (s S)      over the split's range of the m rows      [columns, n]
//
// lora_reduce sums Z over the panels, lora_reduce_wgrad sums G over the splits. With fp32 adapters
// the hi and lo halves of B and of s S are stored side by side.
#pragma once
#include <cstdint>

#include "kernels/gemm/params.h"
#include "kernels/tile/copy.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

template <class T>
struct LoraDsdbParams {
  const T* dy;  // [m, n]
  const T* b;   // [n, columns]
  const T* s;   // [m, columns]
  float* z;     // [panels, m, columns]; may be null
  float* g;     // [splits, columns, n]; may be null
  int64_t dy_pitch, b_pitch, s_pitch;
  int m, n, columns;
  int steps_per_split;  // of 64 rows
};

// A block keeps all of its panel's G in registers, 64 floats per thread for every kColumns: the
// fewer columns, the wider the panel and the fewer partial sums of dS.
template <int kColumns_>
struct LoraDsdbTile {
  static constexpr int kColumns = kColumns_, kColumnChunks = kColumns / 8;
  static constexpr int kThreads = 256, kM = 64, kStages = 3;
  static constexpr int kN = 16384 / kColumns;  // per panel
  static constexpr int kChunkN = 128, kChunks = kN / kChunkN;
  static constexpr uint32_t kDyBytes = kM * kChunkN * 2, kSBytes = kM * kColumns * 2;
  static constexpr uint32_t kB = kStages * kDyBytes;  // the panel of B stays in shared memory
  static constexpr uint32_t kS = kB + kN * kColumns * 2;
  static constexpr uint32_t kSharedBytes = kS + kStages * kSBytes;
  static_assert(kColumns == 16 || kColumns == 32, "with 64, the sums of dS are a second pass");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");
};

// lora_dsdb on mma.sync: a block iterates over its split of the rows, 64 at a time, and for each of
// these steps over the 128-column chunks of its panel. Grid: panels, splits.

template <class T, int kColumns, Alignment kAlignment>
struct LoraDsdbSm80 {
  using Tile = LoraDsdbTile<kColumns>;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  static constexpr int kDsBlocks = kColumns / 16, kDbBlocks = kColumns / 8;
  using Ds = float[kDsBlocks][4];  // 16 rows x half the columns of this warp
  using Db = float[kDbBlocks][4];  // 16 columns of dY x all columns, for one chunk

  const LoraDsdbParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n0 = static_cast<int>(blockIdx.x) * Tile::kN;
  const int chunks = min((p.n - n0 + Tile::kChunkN - 1) / Tile::kChunkN, Tile::kChunks);
  const int first_step = static_cast<int>(blockIdx.y) * p.steps_per_split;
  const int all_steps = (p.m + Tile::kM - 1) / Tile::kM;
  const int end_step = min(first_step + p.steps_per_split, all_steps);

  __device__ __forceinline__ void load_b() const {
    const Copy copy{shared};
    copy.template copy_tile<Tile::kN, kColumns, Tile::kColumnChunks>(
        Tile::kB, {p.b, p.b_pitch, p.n, p.columns}, n0, 0);
  }

  // Next chunk to load. Rows of s S are loaded with the first chunk of their step.
  struct Loads {
    int step, chunk = 0, stage = 0;
  };
  __device__ __forceinline__ void load_next(Loads& next) const {
    if (next.step < end_step) {
      const Copy copy{shared};
      const int row0 = next.step * Tile::kM;
      constexpr int kSThreads = Tile::kM * Tile::kColumnChunks;
      if (next.chunk == 0 && threadIdx.x < kSThreads) {
        copy.template copy_tile<Tile::kM, kColumns, Tile::kColumnChunks>(
            s_tile(next.step), {p.s, p.s_pitch, p.m, p.columns}, row0, 0);
      }
      copy.template copy_tile<Tile::kM, Tile::kChunkN>(
          static_cast<uint32_t>(next.stage) * Tile::kDyBytes, {p.dy, p.dy_pitch, p.m, p.n}, row0,
          n0 + next.chunk * Tile::kChunkN);
      ++next.chunk;
      if (next.chunk == chunks) {
        next.chunk = 0;
        ++next.step;
      }
    }
    next.stage = (next.stage + 1) % Tile::kStages;
    ptx::cp_async_commit_group();
  }
  // s S has as many stages as dY: with one chunk per panel, the copies are two steps ahead.
  __device__ __forceinline__ static uint32_t s_tile(int step) {
    return Tile::kS + static_cast<uint32_t>(step % Tile::kStages) * Tile::kSBytes;
  }

  // Warps 0..3 and 4..7 each cover the 64 rows, 16 per warp, and one half of the columns.
  __device__ __forceinline__ void multiply_ds(Ds& ds, uint32_t dy, int chunk) const {
#pragma unroll
    for (int k16 = 0; k16 < Tile::kChunkN / 16; ++k16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(
          a, dy + panel_chunk_offset<Tile::kM>(warp % 4 * 16 + lane % 16, k16 * 2 + lane / 16));
      const int row = chunk * Tile::kChunkN + k16 * 16 + lane % 16, first = warp / 4 * kDsBlocks;
      if constexpr (kDsBlocks == 1) {
        uint32_t b[2];
        ptx::ldmatrix_x2_trans(b, shared + Tile::kB + row_chunk_offset<kDbBlocks>(row, first));
        ptx::mma_m16n8k16<T>(ds[0], a, b);
      } else {
#pragma unroll
        for (int j = 0; j < kDsBlocks; j += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(
              b, shared + Tile::kB + row_chunk_offset<kDbBlocks>(row, first + j + lane / 16));
          ptx::mma_m16n8k16<T>(ds[j], a, {b[0], b[1]});
          ptx::mma_m16n8k16<T>(ds[j + 1], a, {b[2], b[3]});
        }
      }
    }
  }

  // Each warp: 16 of the chunk's columns of dY, and all columns of s S.
  __device__ __forceinline__ void multiply_db(Db& db, uint32_t dy, uint32_t s) const {
#pragma unroll
    for (int m16 = 0; m16 < Tile::kM / 16; ++m16) {
      uint32_t a[4];
      const int row = m16 * 16 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4_trans(a, dy + panel_chunk_offset<Tile::kM>(row, warp * 2 + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < kDbBlocks; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(
            b, s + row_chunk_offset<kDbBlocks>(m16 * 16 + lane % 16, j + lane / 16));
        ptx::mma_m16n8k16<T>(db[j], a, {b[0], b[1]});
        ptx::mma_m16n8k16<T>(db[j + 1], a, {b[2], b[3]});
      }
    }
  }

  __device__ __forceinline__ void store_ds(const Ds& ds, int step) const {
    if (p.z == nullptr) return;
    float* z = p.z + static_cast<int64_t>(blockIdx.x) * p.m * p.columns;
#pragma unroll
    for (int j = 0; j < kDsBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = step * Tile::kM + warp % 4 * 16 + e / 2 * 8 + lane / 4;
        const int column = (warp / 4 * kDsBlocks + j) * 8 + lane % 4 * 2 + e % 2;
        if (row < p.m && column < p.columns)
          z[static_cast<int64_t>(row) * p.columns + column] = ds[j][e];
      }
    }
  }

  __device__ __forceinline__ void store_db(const Db (&db)[Tile::kChunks]) const {
    if (p.g == nullptr) return;
    float* g = p.g + static_cast<int64_t>(blockIdx.y) * p.columns * p.n;
#pragma unroll
    for (int i = 0; i < Tile::kChunks * kDbBlocks * 4; ++i) {
      const int chunk = i / (kDbBlocks * 4), j = i / 4 % kDbBlocks, e = i % 4;
      const int n = n0 + chunk * Tile::kChunkN + warp * 16 + e / 2 * 8 + lane / 4;
      const int column = j * 8 + lane % 4 * 2 + e % 2;
      if (n < p.n && column < p.columns)
        g[static_cast<int64_t>(column) * p.n + n] = db[chunk][j][e];
    }
  }

  __device__ __forceinline__ void run() const {
    Loads next{first_step};
    load_b();
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(next);
    Db db[Tile::kChunks];
#pragma unroll
    for (int i = 0; i < Tile::kChunks * kDbBlocks * 4; ++i)
      db[i / (kDbBlocks * 4)][i / 4 % kDbBlocks][i % 4] = 0.f;
    uint32_t stage = 0;
    for (int step = first_step; step < end_step; ++step) {
      Ds ds;
#pragma unroll
      for (int i = 0; i < kDsBlocks * 4; ++i) ds[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        if (chunk >= chunks) break;
        ptx::cp_async_wait_group<Tile::kStages - 2>();
        __syncthreads();  // before a read of the loaded stage and before a write to the freed one
        load_next(next);
        const uint32_t dy = shared + stage * Tile::kDyBytes;
        multiply_ds(ds, dy, chunk);
        multiply_db(db[chunk], dy, shared + s_tile(step));
        stage = (stage + 1) % Tile::kStages;
      }
      store_ds(ds, step);
    }
    store_db(db);
  }
};

template <class T, int kColumns, Alignment kAlignment>
__global__ void __launch_bounds__(LoraDsdbTile<kColumns>::kThreads)
    lora_dsdb_sm80(const __grid_constant__ LoraDsdbParams<T> p) {
  LoraDsdbSm80<T, kColumns, kAlignment>{p}.run();
}

}  // namespace lora_ext::kernel
