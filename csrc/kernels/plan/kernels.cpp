// Which kernels compute a problem, and why.
#include <algorithm>
#include <climits>

#include "common/bounds.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

constexpr int64_t kMaxGroups = int64_t{1} << 20, kMaxColumnTiles = 65535;
// Rows of all factors A, in blocks of 16, with which S is a small part of lora_decode's work.
constexpr int64_t kMaxFactorRows = 4096;

// Why the library route computes a problem; "" if the kernels can.
std::string why_library(const Card& card, const Problem& p, const Request& request) {
  const Choice choice = request.choice;
  if (choice == Choice::kLibrary && !request.measured.empty())
    return "fastest as measured " + request.measured;
  if (choice == Choice::kLibrary) return "the library route was asked for";
  if (!p.half_dtype()) return "the kernels compute bfloat16 and float16";
  if (!card.error.empty()) return "CUDA cannot use the device: " + card.error;
  if (card.arch < 80) return "the kernels need compute capability 8.0 or later";
  if (choice == Choice::kKernel && !p.weight_row_major && !p.own_weights())
    return "the weight is not row-major";
  if (p.rank > kMaxRank) return "the rank is above 512";
  if (std::max({p.m, p.n, p.k}) > INT_MAX / 2) return "a size is above 2^30";
  if (blocks_of(p.m, kStep) * blocks_of(std::max(p.n, p.k), kStep) > INT_MAX)
    return "above 2^31 tiles";
  if (p.groups && p.groups->count < 1) return "there are no adapters";
  if (p.groups && p.groups->count > kMaxGroups) return "more than 2^20 adapters";
  const int64_t column_tiles = blocks_of(p.n, 128) + blocks_of(p.k, 128);
  return p.groups && column_tiles > kMaxColumnTiles ? "too many columns for one grid" : "";
}

std::string why_kernels(const Problem& p, const Request& request) {
  if (p.own_weights()) return "experts have weights of their own";
  if (request.choice == Choice::kKernel && !p.given_base && !p.kernels_can_make_base())
    return "the library's base product, since rows do not begin at multiples of 16 bytes";
  if (!request.measured.empty()) return "fastest as measured " + request.measured;
  return request.choice == Choice::kKernel ? "the kernels were asked for"
                                           : "the hybrid route was asked for";
}

// Panels of lora_dsdb, which computes dS and dB in one pass over dY, if its partial sums of dS, 4
// bytes written and 4 read, are at most half of what a second pass would read, 2 an element; else 0.
int panels_of(const Problem& p, int columns) {
  if (p.groups || !p.need_ds() || !p.need_dlora_b || columns > 32) return 0;
  const int64_t panels = blocks_of(p.n, 16384 / (columns <= 16 ? 16 : 32));
  return 8 * columns * panels <= p.n ? static_cast<int>(panels) : 0;
}

Tiled tiled(const Problem& p, const Request& request) {
  Tiled plan;
  const bool ours =
      (request.choice != Choice::kHybrid || p.own_weights()) && p.kernels_can_make_base();
  plan.base = p.given_base ? Base::kGiven : ours ? Base::kKernel : Base::kLibrary;
  plan.terms = p.float_adapters ? 2 : 1;
  plan.width = static_cast<int>(rounded_up(p.rank, chunk_elements(p.dtype)));
  plan.columns = plan.terms * plan.width;
  plan.vector = p.aligned && (!p.own_weights() || p.aligned_weight);
  plan.weight_row_major = p.weight_row_major;
  plan.panels = panels_of(p, plan.columns);
  return plan;
}

Decode decode(const Problem& p) {
  const DecodeTile& tile = decode_tile_for(p.m);
  Decode plan{};
  plan.batch = static_cast<int>(tile.batch);
  plan.terms = p.float_adapters ? 2 : 1;
  plan.width = static_cast<int>(rounded_up(p.rank, 16));
  plan.tiles = blocks_of(p.n, tile.rows);
  plan.s_tiles = blocks_of(p.adapters() * plan.width * plan.terms, tile.rows);
  return plan;
}

// Few rows, with one adapter or an index of adapters.
bool fits_decode(const Card& card, const Problem& p) {
  if (p.backward || p.dropout || (p.groups && !p.groups->indexed)) return false;
  if (p.m < 1 || p.m > kMaxDecodeRows || p.n < 1 || p.k < 1) return false;
  if (!p.kernels_can_make_base() || !p.factor_rows) return false;
  const Decode plan = decode(p);
  return p.adapters() * plan.width * plan.terms <= kMaxFactorRows &&
         plan.tiles + plan.s_tiles <= DecodeShares::kMaxUnits / (blocks_of(p.k, kStep) + 1) &&
         decode_tile_for(p.m).shared <= card.shared_per_block;
}

}  // namespace

Plan choose_kernels(const Card& card, const Problem& p, const Request& request) {
  Plan plan{why_library(card, p, request)};
  plan.card = card, plan.problem = p;
  if (!plan.reason.empty()) return plan;
  plan.reason = why_kernels(p, request);
  const bool may_decode =
      request.choice == Choice::kKernel && request.tile.value_or(Tile::kDecode) == Tile::kDecode;
  plan.sequence = tiled(p, request);
  if (may_decode && fits_decode(card, p)) plan.sequence = decode(p);
  return plan;
}

}  // namespace lora_ext::plan
