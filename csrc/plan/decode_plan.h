// The part of a plan that is lora_decode's (kernel/lora_decode.h): a forward of few rows in one
// launch, with one adapter or many.
#pragma once
#include "plan/plan.h"
#include "plan/plan_prediction.h"

namespace lora_ext::plan {

// Of the instances for up to so many rows, which kernel/lora_decode_launch.h asserts: rows of W in
// a tile, bytes of shared memory, and blocks on an SM that registers leave room for.
struct DecodeTile {
  int64_t batch, rows, shared, resident;
};
constexpr DecodeTile kDecodeTiles[] = {
    {8, 64, 46396, 2}, {16, 64, 51804, 2}, {32, 128, 83116, 1}, {64, 128, 100652, 1}};
constexpr int64_t kMostDecodeRows = 64;
static_assert(facts_of(Tile::kDecode).shared == kDecodeTiles[3].shared);
constexpr const DecodeTile& decode_tile_for(int64_t m) {
  const DecodeTile* tile = kDecodeTiles;
  while (tile->batch < m) ++tile;
  return *tile;
}

// Times 16 ranks of B whose loads are in flight together, as kernel/lora_decode_low_rank.h has
// them.
constexpr int64_t decode_pieces(const DecodeTile& tile, bool float_adapters) {
  return !float_adapters ? 4 : tile.batch < 64 ? 2 : 1;
}

// Whether a forward can be made so: `adapters` is the most that its rows can have.
bool fits_decode(const Card& card, const Problem& p, int64_t adapters);
// The tile, the grid and the workspace, on from what is taken of it.
void place_decode(Plan& plan, const Card& card, const Problem& p, int64_t adapters,
                  const Request& request);
// Of all blocks that an SM has, as counted from the machine code (main_loop_rates.h).
double decode_step_us(const Card& card, const DecodeTile& tile);
Launch decode_launch(const Card& card, const Problem& p, const Plan& plan, int64_t adapters);
std::string describe_decode(const Plan& plan);

// The lead that a plan with our own base product must have in predicted time: as much as a
// prediction may be off, but none where all that it predicts is how long W takes to be read, which
// the library's takes, too.
inline double most_of_others(const Plan& plan) {
  return plan.is_decode() ? 1.0 : 1.0 - kPredictionError;
}

}  // namespace lora_ext::plan
