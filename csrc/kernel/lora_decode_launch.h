// Selects the instance of lora_decode and its grid for a plan.
#pragma once
#include "kernel/lora_decode_sm80.h"
#include "plan/plan.h"

namespace lora_ext::kernel {

template <int kBatch>
constexpr bool is_as_planned_to_decode() {
  using Tile = LoraDecodeTile<kBatch>;
  constexpr plan::DecodeTile kPlanned = plan::decode_tile_for(kBatch);
  return kPlanned.batch == kBatch && kPlanned.rows == Tile::kRows &&
         kPlanned.shared == Tile::kSharedBytes && kPlanned.resident == Tile::kResident;
}
template <class T, class F, int kBatch>
constexpr bool has_pieces_as_planned() {
  constexpr bool kInFloat = std::is_same_v<F, float>;
  return LoraDecodeLowRank<T, F, LoraDecodeTile<kBatch>>::kPieces ==
         plan::decode_pieces(plan::decode_tile_for(kBatch), kInFloat);
}
static_assert(is_as_planned_to_decode<8>() && is_as_planned_to_decode<16>() &&
              is_as_planned_to_decode<32>() && is_as_planned_to_decode<64>());

// F is the type of the factors, float or T. A function of its own, so that csrc/cuda/ compiles it
// once for all sequences. Workspace is not initialised, so arrival counts in it are cleared before.
template <class T, class F, class Launch>
void launch_lora_decode(const plan::Decode& plan, const LoraDecodeParams<T>& params, bool clear,
                        Launch& launch) {
  if (clear) launch.clear(params.arrivals, plan.flag_count());
  const auto run = [&](auto batch) {
    constexpr int kBatch = decltype(batch)::value;
    using Tile = LoraDecodeTile<kBatch>;
    static_assert(has_pieces_as_planned<T, F, kBatch>());
    launch(lora_decode_sm80<T, F, kBatch>, dim3(static_cast<unsigned>(plan.blocks)), Tile::kThreads,
           Tile::kSharedBytes, params);
  };
  switch (plan.batch) {
    case 8:
      return run(std::integral_constant<int, 8>());
    case 16:
      return run(std::integral_constant<int, 16>());
    case 32:
      return run(std::integral_constant<int, 32>());
    default:
      return run(std::integral_constant<int, 64>());
  }
}

}  // namespace lora_ext::kernel
