#include "plan/tiles.h"

namespace lora_ext::plan {
namespace {

// Two blocks per SM, of two stages each; or, if shared memory has no room for both, one block of
// three stages: with one block of two stages, the loop would wait for copies (L40S: 0.65 of the
// tensor rate, 0.93 with three; A100: 0.92 with two blocks, 0.80 with one).
bool is_as_deep_as_fits(const TileFacts& tile, const Card& card) {
  if (tile.tile == Tile::k128x128) return two_blocks_fit(card);
  return tile.tile != Tile::kDeep128x128 || !two_blocks_fit(card);
}

}  // namespace

std::optional<Tile> tile_named(const std::string& name) {
  for (const TileFacts& tile : kTiles)
    if (name == tile.name) return tile.tile;
  return std::nullopt;
}

bool fits(const TileFacts& tile, const Card& card, const Call& call) {
  return is_as_deep_as_fits(tile, card) && tile.shared <= card.shared_per_block &&
         (!tile.wgmma || (card.arch == 90 && card.sm90a_code && card.tensor_maps)) &&
         (!tile.in_grid || fits_in_grid(call)) &&
         (tile.tile != Tile::kDecode || (!call.backward && !call.dropout));
}

std::vector<Tile> tiles_of(const Card& card, const Call& call) {
  std::vector<Tile> tiles;
  for (const TileFacts& tile : kTiles)
    if (fits(tile, card, call)) tiles.push_back(tile.tile);
  return tiles;
}

}  // namespace lora_ext::plan
