// What the self-tests of TMA share: tensors with odd sizes, boxes, and where an element of a box
// lies.
#pragma once

#include <vector>

#include "emulator/selftests/kernels.h"

namespace emulator::selftest {

// Boxes of [rows, columns] of a [height, width] tensor.
struct Tiling {
  CUtensorMapDataType type;
  uint32_t element_bytes;
  Swizzle swizzle;
  uint32_t width, height;
  uint32_t columns, rows;

  uint32_t pitch() const { return (width * element_bytes + 15) / 16 * 16 + 16; }
  uint32_t box_bytes() const { return columns * rows * element_bytes; }
  CUtensorMap map(void* base) const {
    return tensor_map(base, type, swizzle, width, height, pitch(), columns, rows);
  }
  // Byte `byte` of the box's element (row, column), counted from the tile's start: within lines of
  // 128 bytes the swizzles permute the chunks of 16 bytes, each by its own bits of the line number.
  uint32_t place(uint32_t row, uint32_t column, uint32_t byte) const {
    const uint32_t at = (row * columns + column) * element_bytes + byte;
    const uint32_t line = at / 128 % 8, chunk = at % 128 / 16;
    const uint32_t masks[] = {0, 1, 3, 7};
    const uint32_t moved = chunk ^ (line & masks[static_cast<uint32_t>(swizzle)]);
    return at / 128 * 128 + moved * 16 + at % 16;
  }
  bool inside(int64_t x, int64_t y) const { return x >= 0 && y >= 0 && x < width && y < height; }
  int32_t chunk() const { return static_cast<int32_t>(16 / element_bytes); }  // in elements
};

constexpr Tiling kTilings[] = {
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Swizzle::k128, 100, 50, 64, 32},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, Swizzle::k64, 33, 17, 32, 24},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Swizzle::k32, 37, 11, 16, 9},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Swizzle::kNone, 61, 13, 24, 5},
    {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, Swizzle::k128, 201, 19, 128, 16},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, Swizzle::k128, 45, 21, 32, 1},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, Swizzle::k64, 13, 9, 8, 8},
    {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, Swizzle::kNone, 5, 3, 256, 2},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Swizzle::k128, 7, 300, 64, 256},
};

struct Corner {
  int32_t chunks, y;
};
constexpr Corner kCorners[] = {{0, 0}, {1, 5}, {-1, -2}, {5, 9}, {125, 0}, {0, -1000}, {4, 45}};

inline std::vector<unsigned char> pattern(size_t bytes, unsigned seed) {
  std::vector<unsigned char> out(bytes);
  for (size_t i = 0; i < bytes; ++i)
    out[i] = static_cast<unsigned char>((i * 131 + seed * 17) % 251);
  return out;
}

constexpr uint32_t kThreads = 64;

// Threads copy `bytes` of shared memory from `offset` on to global memory.
inline void copy_out(uint32_t offset, uint32_t bytes, unsigned char* out) {
  for (uint32_t i = threadIdx.x; i < bytes; i += kThreads) {
    out[i] = dynamic_shared_memory()[offset + i];
  }
}

// One tensor of four tiles, 16 rows each, for tests of everything but the layout.
constexpr Tiling kTile{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Swizzle::k128, 64, 64, 64, 16};
constexpr uint32_t kTileBytes = 2048, kBar = 8192, kShared = kBar + 2048;

struct Fixture {
  GlobalBuffer<unsigned char> tensor{pattern(kTile.pitch() * kTile.height, 4), "tensor"};
  CUtensorMap map = kTile.map(tensor.data());
};

// One thread initialises an mbarrier that expects this number of bytes.
inline void expect_bytes(uint32_t bytes = kTileBytes) {
  init_mbarriers_alone(kBar, {1});
  mbarrier_arrive_expect_tx(kBar, bytes);
}

inline void fill_tile(unsigned char value) {
  for (uint32_t i = 0; i < kTileBytes; ++i) dynamic_shared_memory()[i] = value;
  fence_proxy_async_shared();
}

}  // namespace emulator::selftest
