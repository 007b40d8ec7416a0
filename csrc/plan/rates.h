// What a card keeps up, and how much of it kernels reach.
#pragma once

#include "plan/main_loop_rates.h"
#include "plan/predict.h"
#include "plan/sizes.h"

namespace lora_ext::plan {

// Of the library's half product at 4096 x 4096 x 4096; of a copy, read and written bytes together;
// from the end of a kernel to the start of the next, in a graph.
struct Sustained {
  double tflops, dram_gb_s, gap_us;
};
Sustained sustained_by(const Card& card);
double microseconds(const Launch& launch, const Sustained& rates);

// By card: 10.x, whose mma.sync was not counted, as 9.0; others by what fits into their shared
// memory.
const MainLoopRates& main_loops_of(const Card& card);
inline double rate_of(const MainLoopRate& rate, bool masked) {
  return masked ? rate.masked : rate.plain;
}
// Of the library's rate, by a loop on mma.sync.
double share_on_mma(const Card& card, double of_tensor_rate);
// What the main loop of a tile of lora_gemm reaches of the rate of the library's, on the card of
// its generation.
double main_loop_share(const Card& card, const TileFacts& tile, bool masked);
// A step of lora_decode, of all blocks that an SM has, in microseconds.
double decode_step_us(const Card& card, const DecodeTile& tile);

}  // namespace lora_ext::plan
