// Sustained rates of a card, and the fraction of them that kernels reach.
#pragma once

#include "plan/main_loop_rates.h"
#include "plan/predict.h"
#include "plan/sizes.h"

namespace lora_ext::plan {

// Rate of the library's half product at 4096 x 4096 x 4096; of a copy, read and written bytes
// together; time from the end of a kernel to the start of the next, in a graph.
struct Sustained {
  double tflops, dram_gb_s, gap_us;
};
Sustained sustained_by(const Card& card);
double microseconds(const Launch& launch, const Sustained& rates);

// Chosen by card: 10.x, whose mma.sync was not counted, as 9.0; others by their shared memory.
const MainLoopRates& main_loops_of(const Card& card);
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
