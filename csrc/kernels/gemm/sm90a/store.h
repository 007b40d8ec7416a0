// The epilogue of lora_gemm on sm_90a: adds the bias in float32, rounds once, and stores Y by TMA
// in slabs of 16 x 64, each warp its own.
//
//   accumulators --bias, round, stmatrix--> slab, swizzled --TMA--> Y, clipped at its edges
//
// wgmma's accumulators have the layout of m16n8: in each block of 8 columns, lane l of warp w holds
// rows 16 w + l / 4 and 16 w + l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once
#include <cstring>

#include "kernels/gemm/sm90a/pipeline.h"
#include "kernels/tile/halves.h"
#include "ptx/mma.h"
#include "ptx/sync.h"

namespace lora_ext::kernel {

// The bias of a tile's columns in lora_gemm on sm_90a: loaded into shared memory as floats before
// the last of the tile's products have ended, so that the epilogue waits for no load. Each consumer
// has its own row of it, since they may be at different tiles.
template <class T, class Tile>
struct LoraGemmSm90aBias {
  static constexpr int kEach = Tile::kBiasColumns / Tile::kWarpgroup;  // per thread

  // The bias of columns `thread`, thread + kWarpgroup, ...: raw bits as loaded, since a conversion
  // would wait for the load to end.
  struct Loaded {
    uint32_t bits[kEach];
  };

  const LoraGemmParams<T>& p;
  const int consumer, thread;

  __device__ __forceinline__ bool given() const { return p.bias != nullptr; }

  // Loads the bias of the tile that begins at `column`; zero past the last column. Before that of
  // column 0 there are so many of others.
  __device__ __forceinline__ Loaded load(int column, int64_t others = 0) const {
    Loaded loaded{};
    if (given()) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = column + thread + i * Tile::kWarpgroup;
        if (at < p.n) loaded.bits[i] = bits_at(others + at);
      }
    }
    return loaded;
  }

  // Called after a barrier that ends all reads of the row of the tile before, and followed by one.
  __device__ __forceinline__ void put(const Loaded& loaded) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) row()[thread + i * Tile::kWarpgroup] = value_of(loaded.bits[i]);
  }

  // Returns the bias of two neighbouring columns of the tile.
  __device__ __forceinline__ float2 pair(int column) const {
    return *reinterpret_cast<const float2*>(row() + column);
  }

  __device__ __forceinline__ float* row() const {
    unsigned char* rows = ptx::dynamic_shared_memory() + Tile::kBias;
    return reinterpret_cast<float*>(rows) + static_cast<size_t>(consumer) * Tile::kBiasColumns;
  }

  __device__ __forceinline__ uint32_t bits_at(int64_t column) const {
    uint32_t bits = 0;
    if (p.float_bias) {
      const float value = static_cast<const float*>(p.bias)[column];
      memcpy(&bits, &value, sizeof value);
    } else {
      const T value = static_cast<const T*>(p.bias)[column];
      memcpy(&bits, &value, sizeof value);  // the low half: the device is little-endian
    }
    return bits;
  }

  __device__ __forceinline__ float value_of(uint32_t bits) const {
    float value;
    T half;
    memcpy(&value, &bits, sizeof value);
    memcpy(static_cast<void*>(&half), &bits, sizeof half);
    return p.float_bias ? value : static_cast<float>(half);
  }
};

template <class T, class Tile>
struct LoraGemmSm90aEpilogue {
  using Accumulators = float[Tile::kRowBlocks][Tile::kN / 2];
  using Place = typename LoraGemmSm90aBlock<T, Tile>::Place;

  const LoraGemmMaps& maps;
  const LoraGemmParams<T>& p;
  const int consumer;
  const int thread = threadIdx.x % Tile::kWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  const LoraGemmSm90aBias<T, Tile> bias{p, consumer, thread};
  const uint32_t slabs =
      ptx::shared_address(ptx::dynamic_shared_memory()) + Tile::kStaging +
      static_cast<uint32_t>(consumer * 4 + warp) * Tile::kSlabs * Tile::kSlabBytes;

  __device__ __forceinline__ int first_row(const Place& at, int row_block) const {
    return at.row + consumer * Tile::kRowsApart + row_block * 64 + warp * Tile::kSlabRows;
  }

  // Called while products are in flight.
  __device__ __forceinline__ void put_bias(
      const typename LoraGemmSm90aBias<T, Tile>::Loaded& loaded) const {
    if (!bias.given()) return;
    warpgroup_barrier();
    bias.put(loaded);
    warpgroup_barrier();
  }

  // Each warp by itself: no warp waits for another.
  __device__ __forceinline__ void store(const Accumulators& acc, const Place& at) const {
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
      for (int part = 0; part < Tile::kN / 64; ++part) {
        constexpr int kParts = Tile::kN / 64;
        const uint32_t slab =
            slabs + static_cast<uint32_t>((i * kParts + part) % Tile::kSlabs) * Tile::kSlabBytes;
        wait_until_free();
        fill(slab, &acc[i][part * 32], part * 64);
        store_slab(slab, at.column + part * 64, first_row(at, i));
      }
    }
  }

  // Waits until the store before last has read its slab, which is filled next. Bulk groups belong
  // to a lane: the elected one, which is always the same.
  __device__ __forceinline__ void wait_until_free() const {
    if (ptx::elect_sync()) ptx::bulk_wait_group_read<Tile::kSlabs - 1>();
    __syncwarp();
  }

  // Fills a slab with 16 x 64 accumulators, 32 per lane, in blocks of 8 columns.
  __device__ __forceinline__ void fill(uint32_t slab, const float* acc, int column0) const {
    constexpr int kBatch = Tile::kAccumulators > 128 ? 2 : 8;  // loads at once, as registers allow
#pragma unroll
    for (int first = 0; first < 8; first += kBatch) {
      float2 added[kBatch] = {};
      if (bias.given()) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          added[i] = bias.pair(column0 + (first + i) * 8 + lane % 4 * 2);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i += 2) store_blocks(slab, first + i, acc, &added[i]);
    }
  }

  // Stores two blocks as four 8 x 8 matrices of a warp's 16 rows: for each block the upper, then
  // the lower one. Chunk c of row r is at c ^ (r % 8), as the swizzle requires.
  __device__ __forceinline__ void store_blocks(uint32_t slab, int block, const float* acc,
                                               const float2* added) const {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = acc + block * 4 + i * 2;
      packed[i] = rounded_pair<T>(pair[0] + added[i / 2].x, pair[1] + added[i / 2].y);
    }
    const int row = lane % 16;
    const int chunk = (block + lane / 16) ^ (row % 8);
    ptx::stmatrix_x4(slab + static_cast<uint32_t>(row * 8 + chunk) * 16, packed);
  }

  __device__ __forceinline__ void store_slab(uint32_t slab, int column, int row) const {
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::elect_sync()) {
      ptx::tma_store_2d(&maps.y, slab, column, row);
      ptx::bulk_commit_group();
    }
  }

  // Waits for the writes to global memory, too: they must end within this grid, and shared memory
  // must last until it has been read.
  __device__ __forceinline__ void drain() const {
    if (ptx::elect_sync()) ptx::bulk_wait_group<0>();
  }

  __device__ __forceinline__ void warpgroup_barrier() const {
    constexpr uint32_t kThreads = Tile::kWarpgroup;
    ptx::bar_sync(1u + static_cast<uint32_t>(consumer), kThreads);
  }
};

}  // namespace lora_ext::kernel
