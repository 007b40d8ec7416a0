// Tiles, two-term splits and adapter loads of the AMX passes.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

struct AmxDropout {
  static constexpr int kDropoutWords = 2;
  static void dropout_words(const uint64_t* products, const DropoutRow& row,
                            const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
    avx512_dropout_words(products, row, keys, keep_count, words);
  }
};

constexpr int64_t kShrinkDepth = 512;  // staged columns of shrink: 32 KB
// Rows and columns that wgrad stages at a time, 128 KB in the second cache: memory is read along the
// rows. 64 columns at a time took 1.3 times as long.
constexpr int64_t kWgradRows = 128, kWgradCols = 512;

// Tiles 0-3 hold sums, 4-5 the A side, 6-7 the B side; all are 16 rows of 64 bytes.
struct TileConfig {
  alignas(64) uint8_t bytes[64] = {};

  TileConfig() {
    bytes[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      bytes[16 + 2 * tile] = 64;
      bytes[48 + tile] = kTileRows;
    }
    _tile_loadconfig(bytes);
  }
  ~TileConfig() { _tile_release(); }
};
