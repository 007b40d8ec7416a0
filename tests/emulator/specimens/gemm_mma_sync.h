// C [m, n] = A [m, k] · B + bias [n] on mma.sync (sm_80 and later): fp16 or bf16 in, fp32 out, any
// m, n and k.
//
// B lies as [n, k] (K-major, as a linear layer's weight) or as [k, n] (MN-major). A block computes
// a 64 x 64 tile of C with four warps of 32 x 32 and walks k in steps of 64 through a ring of three
// stages:
//
//   global --cp.async--> stage (A tile 8 KiB, B tile 8 KiB) --ldmatrix--> fragments --mma.sync-->
//   accumulators --> global
//
// A tile has rows of 64 elements = 128 bytes = 8 chunks; chunk c of row r is kept at position c ^
// (r % 8), so that the eight rows of an ldmatrix lie in different banks. What lies outside the
// matrices is filled with zeros by cp.async.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator/fault.h"
#include "ptx/cp_async.h"
#include "ptx/matrix_move.h"
#include "ptx/mma.h"
#include "ptx/thread.h"

namespace specimens {

namespace ptx = lora_ext::ptx;

template <class T>
struct GemmMmaSyncParams {
  const T* a;         // [m, k], rows `a_pitch` elements apart, a multiple of 8
  const T* b;         // [n, k] or [k, n], rows `b_pitch` elements apart, a multiple of 8
  const float* bias;  // [n], or null
  float* c;           // [m, n], rows `c_pitch` elements apart
  int m, n, k;
  int a_pitch, b_pitch, c_pitch;
};

template <class T, bool kMNMajorB, class Fault>
struct GemmMmaSync {
  static constexpr int kTile = 64;  // rows and columns of C's tile, and the step along k
  static constexpr int kThreads = 128;
  static constexpr int kStages = 3;
  static constexpr uint32_t kTileBytes = kTile * kTile * sizeof(T);
  static constexpr uint32_t kStageBytes = 2 * kTileBytes;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;

  const GemmMmaSyncParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = static_cast<int>(blockIdx.y) * kTile;
  const int first_column = static_cast<int>(blockIdx.x) * kTile;
  const int warp_row = warp % 2 * 32, warp_column = warp / 2 * 32;
  const int k_steps = (p.k + kTile - 1) / kTile;

  __device__ __forceinline__ static uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>(row * 128 + (chunk ^ row % 8) * 16);
  }
  __device__ __forceinline__ uint32_t tile_a(int stage) const {
    return shared + stage * kStageBytes;
  }
  __device__ __forceinline__ uint32_t tile_b(int stage) const { return tile_a(stage) + kTileBytes; }

  // Starts the copy of the 64 x 64 tile at (row0, column0) of a matrix [rows, columns]; each thread
  // copies four chunks of 8 elements. A chunk that crosses the end of its row reads the elements
  // before it only.
  __device__ __forceinline__ void copy_tile(uint32_t tile, const T* matrix, int pitch, int rows,
                                            int columns, int row0, int column0) const {
#pragma unroll
    for (int i = 0; i < kTile * 8 / kThreads; ++i) {
      const int tile_row = static_cast<int>(threadIdx.x) / 8 + i * (kThreads / 8);
      const int chunk = static_cast<int>(threadIdx.x) % 8;
      const int row = row0 + tile_row, column = column0 + chunk * 8;
      const int left = Fault::count("copy.columns", columns, columns - 1, columns + 1) - column;
      const bool inside = Fault::flag(
          "copy.inside", row < Fault::count("copy.rows", rows, rows - 1, rows + 1) && left > 0);
      const T* source = inside ? matrix + static_cast<size_t>(row) * pitch + column : matrix;
      const uint32_t elements = Fault::flag("copy.whole_chunk", left >= 8) ? 8 : left;
      const uint32_t bytes = inside ? elements * sizeof(T) : 0;
      ptx::cp_async_16(tile + chunk_offset(tile_row, chunk), source, bytes);
    }
  }

  __device__ __forceinline__ void copy_stage(int step) const {
    const int stage = step % kStages, k0 = step * kTile;
    copy_tile(tile_a(stage), p.a, p.a_pitch, p.m, p.k, first_row, k0);
    if constexpr (kMNMajorB) {
      copy_tile(tile_b(stage), p.b, p.b_pitch, p.k, p.n, k0, first_column);
    } else {
      copy_tile(tile_b(stage), p.b, p.b_pitch, p.n, p.k, first_column, k0);
    }
  }

  // Two row blocks of 16 x 16 of A: the lanes 0..15 address the rows of the left half, 16..31 those
  // of the right half.
  __device__ __forceinline__ void load_a(uint32_t (&a)[2][4], int stage, int k16) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + i * 16 + lane % 16;
      ptx::ldmatrix_x4(a[i], tile_a(stage) + chunk_offset(row, k16 * 2 + lane / 16));
    }
  }

  // Four column blocks of 16 x 8 of B; one ldmatrix fills the fragments of two of them.
  __device__ __forceinline__ void load_b(uint32_t (&b)[4][2], int stage, int k16) const {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const int column = warp_column + j * 8;
      uint32_t pair[4];
      if constexpr (kMNMajorB) {  // tile rows are k: matrices (k 0-7, n 0-7), (k 8-15, n 0-7), then
                                  // n 8-15
        const int row = k16 * 16 + lane % 16;
        ptx::ldmatrix_x4_trans(pair, tile_b(stage) + chunk_offset(row, column / 8 + lane / 16));
      } else {  // tile rows are n: the same four matrices
        const int row = column + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4(pair, tile_b(stage) + chunk_offset(row, k16 * 2 + lane / 8 % 2));
      }
      b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
    }
  }

  __device__ __forceinline__ void multiply_stage(float (&acc)[2][4][4], int stage) const {
#pragma unroll
    for (int k16 = 0; k16 < kTile / 16; ++k16) {
      uint32_t a[2][4], b[4][2];
      load_a(a, stage, k16);
      load_b(b, stage, k16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::mma_m16n8k16<T>(acc[i][j], a[i], b[j]);
      }
    }
  }

  // Prologue and main loop. Step s computes on stage s % 3 while the copies of steps s + 1 and s +
  // 2 are in flight. A group is committed on every step, even an empty one, so that "all but the
  // latest kStages - 2" always means step s.
  __device__ __forceinline__ void accumulate(float (&acc)[2][4][4]) const {
    for (int step = 0; step < Fault::count("prologue.steps", kStages - 1, kStages - 2, kStages);
         ++step) {
      if (Fault::flag("prologue.exists",
                      step < Fault::count("prologue.k_steps", k_steps, k_steps - 1, k_steps + 1))) {
        copy_stage(step);
      }
      if (!Fault::skip("prologue.commit")) ptx::cp_async_commit_group();
    }
    for (int step = 0; step < Fault::count("loop.k_steps", k_steps, k_steps - 1, k_steps + 1);
         ++step) {
      if (Fault::swap("loop.wait_one_group_less")) {
        ptx::cp_async_wait_group<kStages - 1>();
      } else if (!Fault::skip("loop.wait")) {
        ptx::cp_async_wait_group<kStages - 2>();
      }
      // One barrier serves both ends of the ring: every thread's copies into this step's stage are
      // there, and every warp has left the stage that the copy below fills again.
      if (!Fault::skip("loop.barrier")) __syncthreads();
      const int next = step + kStages - 1;
      if (Fault::flag("loop.next_exists", next < Fault::count("loop.next_k_steps", k_steps,
                                                              k_steps - 1, k_steps + 1))) {
        copy_stage(next);
      }
      if (!Fault::skip("loop.commit")) ptx::cp_async_commit_group();
      multiply_stage(acc, step % kStages);
    }
  }

  // Lane l holds, of each 16 x 8 block, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the one
  // after it.
  __device__ __forceinline__ void store(const float (&acc)[2][4][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + warp_row + i * 16 + e / 2 * 8 + lane / 4;
          const int column = first_column + warp_column + j * 8 + lane % 4 * 2 + e % 2;
          if (Fault::flag("store.inside",
                          row < Fault::count("store.rows", p.m, p.m - 1, p.m + 1) &&
                              column < Fault::count("store.columns", p.n, p.n - 1, p.n + 1))) {
            const float bias = Fault::flag("store.bias", p.bias != nullptr) ? p.bias[column] : 0.f;
            p.c[static_cast<size_t>(row) * p.c_pitch + column] = acc[i][j][e] + bias;
          }
        }
      }
    }
  }
};

template <class T, bool kMNMajorB, class Fault = emulator::NoFault>
__global__ void __launch_bounds__(128) gemm_mma_sync(const GemmMmaSyncParams<T> p) {
  const GemmMmaSync<T, kMNMajorB, Fault> gemm{p};
  float acc[2][4][4];
  if (!Fault::skip("accumulators.zero")) {
#pragma unroll
    for (int i = 0; i < 2 * 4 * 4; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
  gemm.accumulate(acc);
  gemm.store(acc);
}

}  // namespace specimens
