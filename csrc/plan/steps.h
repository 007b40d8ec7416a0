// The steps of a plan, in order; plan.h names their files.
#pragma once
#include "plan/decode_shares.h"
#include "plan/plan.h"
#include "plan/sizes.h"

namespace lora_ext::plan {

// Sets the reason, and the sequence of kernels, if any.
Plan choose_kernels(const Card& card, const Problem& problem, const Request& request);
// Sets the tiles, splits and blocks of that sequence.
void choose_tiles(Plan& plan, const Card& card, const Problem& problem, const Request& request);
// Sets the offsets of intermediates in the workspace, and its size.
void place_in_workspace(Plan& plan, const Problem& problem);

inline DecodeShares shares_of(const Decode& plan, const Problem& p) {
  return {static_cast<int>(plan.tiles), static_cast<int>(plan.s_tiles),
          static_cast<int>(blocks_of(p.k, kStep)), plan.blocks};
}

}  // namespace lora_ext::plan
