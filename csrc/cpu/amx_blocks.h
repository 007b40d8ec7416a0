// The blocks of the layer in one pass on AMX tiles, and its sums: 32 rows by 32 columns, 2 x 2 tiles.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

constexpr int64_t kSumTiles = 4 * kTileRows * kTileRows;
// A depth of up to 1536 is one block: Q is packed once, and no sums are kept for the next.
constexpr int64_t kWholeSteps = 48, kMostSteps = 40, kInnerSteps = 20, kMostBlocks = 18;

// With fewer rows torch's product and passes are faster: at 16 rows of 1024 -> 4096 a forward took 1.2
// times theirs, at 32 rows 0.86. Of several adapters each one's U is multiplied by a tile's 32 rows:
// with 16 rows each, at 2048, one pass took 2.0 of merged, passes 1.7.
constexpr int64_t kTileLeastRows = 32, kTileLeastCols = 256;

// In steps of 32.
struct Depths {
  int64_t steps, outer, inner;

  explicit Depths(int64_t depth) : steps(round_up(depth, kTileDepth) / kTileDepth) {
    const auto even = [](int64_t all, int64_t most) {
      const int64_t parts = (all + most - 1) / most;
      return (all + parts - 1) / parts;
    };
    outer = steps <= kWholeSteps ? steps : even(steps, kMostSteps);
    inner = even(outer, kInnerSteps);
  }
  bool is_whole() const { return outer >= steps; }
  // The pitch of a packed block of columns. Not a power of two: blocks would share lines of a cache.
  int64_t pitch() const { return outer * kStepElements + kStepElements / 16; }
};

int64_t product_cols(int64_t depth, int64_t /*rows*/ = 0) {
  return std::min<int64_t>(kMostBlocks, 576 / Depths(depth).outer) * kRowBlock;
}

// Each group of columns makes T anew: for a tile of its ranks two products beside four for each 32
// columns, under a mask also a copy of P. The pass of shrink reads P from memory once more instead. A
// forward with own T takes 0.95 of the time of one with that pass for one group, 0.96 to 1.0 for two;
// 1.0 to 1.1 for three, for more tiles of T, or for two groups and a mask.
bool makes_t(int64_t cols, const AdapterView& q, bool is_masked) {
  const int64_t most = product_cols(q.cols), groups = (cols + most - 1) / most;
  const int64_t terms = q.dtype == Dtype::kBFloat16 ? 1 : 2;
  const int64_t tiles = groups * terms * round_up(q.rank, kTileRows) / kTileRows;
  return groups == 1 || (!is_masked && tiles <= 2);
}

inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kSumTiles / 4, 64);
  _tile_loadd(2, sums + kSumTiles / 2, 64);
  _tile_loadd(3, sums + kSumTiles / 4 * 3, 64);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSumTiles / 4, 64);
  _tile_stored(2, sums + kSumTiles / 2, 64);
  _tile_stored(3, sums + kSumTiles / 4 * 3, 64);
}

inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}
