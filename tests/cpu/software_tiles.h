// AMX tiles in software: isa_amx.cpp is compiled with this header before it, and runs wherever
// AVX512_BF16 is. A tile that is used without a configuration ends the program.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace software_tiles {

constexpr int kRows = 16, kRowBytes = 64;

struct Tile {
  uint8_t row[kRows][kRowBytes];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void need_configuration() {
  if (!configured) __builtin_trap();
}

// The one configuration in use: palette 1, all tiles of 16 rows of 64 bytes.
inline void configure(const uint8_t* bytes) {
  if (bytes[0] != 1) __builtin_trap();
  for (int tile = 0; tile < 8; ++tile) {
    if (bytes[16 + 2 * tile] != kRowBytes || bytes[48 + tile] != kRows) __builtin_trap();
  }
  configured = true;
}

inline void load(int tile, const void* from, int64_t stride) {
  need_configuration();
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(tiles[tile].row[r], static_cast<const char*>(from) + r * stride, kRowBytes);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  need_configuration();
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile].row[r], kRowBytes);
  }
}

inline void zero(int tile) {
  need_configuration();
  std::memset(&tiles[tile], 0, sizeof(Tile));
}

inline float wide(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// TDPBF16PS: C[m][n] += sum over pairs k of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1].
inline void dot(int c, int a, int b) {
  need_configuration();
  for (int m = 0; m < kRows; ++m) {
    float sums[kRows];
    uint16_t left[32], right[32];
    std::memcpy(sums, tiles[c].row[m], kRowBytes);
    std::memcpy(left, tiles[a].row[m], kRowBytes);
    for (int k = 0; k < kRows; ++k) {
      std::memcpy(right, tiles[b].row[k], kRowBytes);
      for (int n = 0; n < kRows; ++n) {
        sums[n] += wide(left[2 * k]) * wide(right[2 * n]);
        sums[n] += wide(left[2 * k + 1]) * wide(right[2 * n + 1]);
      }
    }
    std::memcpy(tiles[c].row[m], sums, kRowBytes);
  }
}

}  // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(bytes) software_tiles::configure(bytes)
#define _tile_release() (software_tiles::configured = false)
#define _tile_zero(tile) software_tiles::zero(tile)
#define _tile_loadd(tile, from, stride) software_tiles::load(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) software_tiles::load(tile, from, stride)
#define _tile_stored(tile, to, stride) software_tiles::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) software_tiles::dot(c, a, b)
// The processor has AMX, and Linux grants it.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = 1u << 22 | 1u << 24, 1)
#define syscall(...) 0L
