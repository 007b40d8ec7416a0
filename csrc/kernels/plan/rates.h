// Sustained rates of a card, and the fraction of them that kernels reach.
//
// What main loops reach of the tensor rate was recorded in November 2026 by a replay of nvcc
// 13.0.88's machine code that is no longer in the tree.
#pragma once
#include "kernels/plan/predict.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {

// The rate of lora_gemm's loop over k; 0 if there is no such kernel.
struct MainLoopRate {
  double plain, masked;
};

// The rates of main loops on the cards that were counted: A100, L40S, H100. Any other card has
// those of one of them: 10.x, whose mma.sync was not counted, as 9.0; others by shared memory.
template <class Rate>
using OnCards = Rate[3];
template <class Rate>
const Rate& on(const Card& card, const OnCards<Rate>& rates) {
  if (card.arch >= 90 && card.arch < 120) return rates[2];
  return rates[two_blocks_fit(card) ? 0 : 1];
}

constexpr OnCards<double> kLibraryRate = {0.942, 0.942, 1.000};
// In the order of kTiles.
constexpr OnCards<MainLoopRate> kTileRates[] = {
    {{0.913, 0.870}, {0.640, 0.667}, {0.785, 0.847}},  // 128 x 128
    {{0.824, 0.816}, {0.936, 0.936}, {0.821, 0.851}},  // deep 128 x 128
    {{0.734, 0.754}, {0.613, 0.613}, {0.577, 0.571}},  // 128 x 64
    {{0.000, 0.000}, {0.000, 0.000}, {1.000, 1.000}},  // fused-shrink 128 x 256
    {{0.000, 0.000}, {0.000, 0.000}, {1.000, 1.000}},  // wgmma 128 x 256
    {{0.000, 0.000}, {0.000, 0.000}, {0.923, 0.923}},  // pingpong 128 x 192
};
constexpr OnCards<MainLoopRate> kShrinkRate = {{0.494, 0.324}, {0.494, 0.324}, {0.383, 0.269}};
constexpr OnCards<MainLoopRate> kWgradRate = {{0.470, 0.495}, {0.470, 0.495}, {0.504, 0.420}};
// With 16 columns, and with 32.
constexpr OnCards<double> kDsdbRate[] = {{0.198, 0.198, 0.204}, {0.322, 0.322, 0.336}};
// Microseconds of a step of lora_decode, for all blocks of an SM, in the order of kDecodeTiles.
constexpr OnCards<double> kDecodeUs[] = {
    {0.440, 0.548, 0.369}, {0.510, 0.271, 0.418}, {0.667, 0.549, 0.529}, {0.977, 0.681, 0.817}};

// Rate of the library's half product at 4096 x 4096 x 4096; of a copy, read and written bytes
// together; time from the end of a kernel to the start of the next, in a graph.
struct Sustained {
  double tflops, dram_gb_s, gap_us;
};
Sustained sustained_by(const Card& card);
double microseconds(const Launch& launch, const Sustained& rates);

inline double rate_of(const MainLoopRate& rate, bool masked) {
  return masked ? rate.masked : rate.plain;
}
// Relative to the library's rate, for a loop on mma.sync.
double share_on_mma(const Card& card, double of_tensor_rate);
// Rate of the main loop of a tile of lora_gemm, relative to the library's, on the card of its
// generation.
double main_loop_share(const Card& card, const TileFacts& tile, bool masked);
// Microseconds of a step of lora_decode, of all blocks that an SM has.
double decode_step_us(const Card& card, const DecodeTile& tile);

}  // namespace lora_ext::plan
