#include "kernels/plan/rates.h"

#include <algorithm>
#include <iterator>

namespace lora_ext::plan {
namespace {

// Vendors' dense rates times 0.8 and bandwidths times 0.9, for one card of each generation. Other
// cards of the generation are assumed to have the same per SM. `mma_share`: the rate of mma.sync
// over that of the library, which has faster instructions for its products on 9.0 (arXiv:2501.12084
// measured 494 of 757 TFLOP/s) and 10.x.
struct Generation {
  int arch, sms;
  double tflops, dram_gb_s, mma_share;
};
constexpr Generation kGenerations[] = {
    {80, 108, 250, 1830, 1.0},     // A100
    {86, 72, 100, 540, 1.0},       // A10
    {89, 142, 290, 780, 1.0},      // L40S
    {90, 132, 790, 3000, 0.65},    // H100 SXM
    {100, 148, 1800, 7000, 0.25},  // B200
    {120, 170, 170, 1600, 1.0},    // RTX 5090
};

// The last generation that is not newer than the card.
const Generation& generation_of(const Card& card) {
  const Generation* found = &kGenerations[0];
  for (const Generation& each : kGenerations)
    if (each.arch <= card.arch) found = &each;
  return *found;
}

static_assert(std::size(kTileRates) == static_cast<size_t>(Tile::kDecode));
static_assert(std::size(kDecodeUs) == std::size(kDecodeTiles));

}  // namespace

Sustained sustained_by(const Card& card) {
  const Generation& known = generation_of(card);
  const double sms = static_cast<double>(card.sms) / known.sms;
  return {sms * known.tflops, sms * known.dram_gb_s, 1.5};
}

double microseconds(const Launch& launch, const Sustained& rates) {
  const double products = launch.flop / (rates.tflops * 1e6);
  const double copies = launch.bytes / (rates.dram_gb_s * 1e3);
  return std::max(products, copies) + static_cast<double>(launch.times) * rates.gap_us;
}

double share_on_mma(const Card& card, double of_tensor_rate) {
  return of_tensor_rate / on(card, kLibraryRate) * generation_of(card).mma_share;
}

double main_loop_share(const Card& card, const TileFacts& tile, bool masked) {
  if (tile.tile == Tile::kDecode) return 0.0;  // see decode_step_us
  const double rate = rate_of(on(card, kTileRates[static_cast<int>(tile.tile)]), masked);
  return tile.wgmma ? rate / on(card, kLibraryRate) : share_on_mma(card, rate);
}

double decode_step_us(const Card& card, const DecodeTile& tile) {
  size_t at = 0;
  while (kDecodeTiles[at].batch != tile.batch) ++at;
  return on(card, kDecodeUs[at]);
}

}  // namespace lora_ext::plan
