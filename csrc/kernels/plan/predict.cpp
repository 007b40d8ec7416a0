// What cards sustain, the launches of our kernels, and what a call takes by its launches.
#include "kernels/plan/predict.h"

#include <algorithm>

#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

// Vendors' dense rates times 0.8, bandwidths times 0.9; other cards of a generation have the same per
// SM. The library has faster instructions than mma.sync on 9.0 (arXiv:2501.12084 measured 494 of 757
// TFLOP/s) and 10.x. GeForce cards sum in float32 at half of the rate.
struct Generation {
  int arch, sms;
  Sustained rates;
  bool geforce = false;
};
constexpr Generation kGenerations[] = {
    {80, 108, {250, 1.0, 1830}},       // A100
    {86, 72, {100, 1.0, 540}},         // A10
    {86, 82, {57, 1.0, 840}, true},    // RTX 3090
    {89, 142, {290, 1.0, 780}},        // L40S
    {89, 128, {132, 1.0, 907}, true},  // RTX 4090
    {90, 132, {790, 0.65, 3000}},      // H100 SXM
    {100, 148, {1800, 0.25, 7000}},    // B200
    {120, 170, {170, 1.0, 1600}},      // RTX 5090
};

// What skinny products reach of mma.sync's rate, with columns in whole tiles of 64; with dropout,
// its draws.
constexpr double kSkinnyShare = 0.5, kMaskedShare = 0.33;
// Bytes of W that a block of lora_decode takes in a nanosecond, whatever the number of rows.
constexpr double kDecodeBytesPerNs = 20;

// The launches of a plan::Tiled, of one adapter or many, in the order of kernels/sequence/.
class TiledLaunches {
 public:
  TiledLaunches(Launches& launches, const Plan& plan)
      : launches_(launches), card_(plan.card), p_(plan.problem), plan_(*plan.tiled()) {}

  void add() {
    const bool adapters = plan_.a != kNone || plan_.b != kNone, s = plan_.s != kNone;
    const double s_bytes = s ? kFloat * area(p_.m, p_.rank) + t_ : 0.0;
    if (p_.groups) tables(*p_.groups);
    if (!p_.groups && (adapters || s))
      launches_.push_back(
          {"lora_split", (adapters ? factors_ * (kFloat + 2 * e_) : 0.0) + s_bytes});
    shrink();
    const double reduced = (plan_.z != kNone ? z_ + t_ : 0.0) + (p_.groups ? s_bytes : 0.0);
    if (reduced > 0) launches_.push_back({"lora_reduce", reduced});
    if (plan_.gemm) gemm();
    if (plan_.has_wgrad()) wgrad();
    if (plan_.g_a != kNone || plan_.g_b != kNone)
      launches_.push_back({"lora_reduce_wgrad", g_a_ + g_b_});
    if (plan_.gemm && plan_.base == Base::kLibrary)
      launches_.push_back(library_product(card_, p_.dtype, "the library's base product, onto it",
                                          p_.m, p_.columns(), p_.depth(), true));
  }

 private:
  void skinny(const char* name, int64_t width, double other_bytes, int64_t tiles, bool masked) {
    const double flop = 2 * 64 * area(p_.m, width * blocks_of(plan_.columns, 64));
    const double share = (masked ? kMaskedShare : kSkinnyShare) * mma_share_;
    launches_.push_back({name, e_ * area(p_.m, width) + other_bytes, flop, share, tiles});
  }

  // Also all factors and gradients but those of the first adapter, read and written once.
  void tables(const Groups& groups) {
    const double others = static_cast<double>(p_.adapters() - 1) * (p_.backward ? 2 : 1);
    const int64_t entries = groups.listed ? groups.count * (p_.backward ? 2 : 1) : 0;
    const int64_t count = (groups.indexed ? 3 : 1) + blocks_of(entries, kGroupedEntries);
    launches_.push_back({"tables", others * (p_.float_adapters ? kFloat : e_) * factors_, 0, 1, 1,
                         count, kHostLaunchUs * static_cast<double>(count)});
  }

  void shrink() {
    const int64_t tiles = blocks_of(p_.m, 64) * blocks_of(plan_.z_columns, 64);
    if (plan_.one_pass())
      skinny("lora_dsdb", p_.n, t_ + z_ + g_b_, plan_.panels * plan_.dlora_b.splits, false);
    else if (plan_.shrink.splits > 0)
      skinny("lora_shrink", p_.depth(), z_, tiles * plan_.shrink.splits,
             p_.dropout && !p_.backward);
  }

  void gemm() {
    const TileFacts& tile = facts_of(plan_.gemm->tile);
    const int64_t tiles = tiles_of_product(tile, p_), terms = p_.float_adapters ? 3 : 1;
    const int64_t depth = p_.depth(), columns = p_.columns(), rank = 16 * blocks_of(p_.rank, 16);
    const double low_rank = e_ * static_cast<double>(terms) * area(p_.rank, p_.m + columns);
    if (plan_.base != Base::kKernel) {
      const double onto = p_.given_base && !p_.backward ? e_ * area(p_.m, columns) : 0.0;
      return skinny("lora_gemm", columns, low_rank + onto, tiles, p_.masked_product());
    }
    const double share = tile.share * (tile.wgmma ? 1 : mma_share_);
    // Tiles with rows of several adapters have the low-rank steps of each; experts have their own.
    const int64_t weights = p_.own_weights() ? p_.adapters() : 1;
    const int64_t steps =
        terms * rank * (weights > 1 ? 1 : 1 + (p_.adapters() - 1) / blocks_of(p_.m, tile.rows));
    const double bytes = area(p_.m, depth) + area(weights * columns, depth) + area(p_.m, columns);
    launches_.push_back({"lora_gemm", e_ * bytes + low_rank,
                         2 * area(tiles * tile.rows * tile.columns, depth + steps), share, tiles});
  }

  // Blocks without dropout are taken to be as slow as those of dA, with which they share SMs.
  void wgrad() {
    const bool da = plan_.dlora_a.splits > 0, db = plan_.db_apart();
    const int64_t tiles = blocks_of(p_.k, 128) * plan_.dlora_a.splits +
                          (db ? blocks_of(p_.n, 128) * plan_.dlora_b.splits : 0);
    skinny("lora_wgrad", (da ? p_.k : 0) + (db ? p_.n : 0), t_ + g_a_ + (db ? g_b_ : 0.0),
           tiles * blocks_of(plan_.columns, 64), p_.dropout && da);
  }

  Launches& launches_;
  const Card& card_;
  const Problem& p_;
  const Tiled& plan_;
  const double mma_share_ = sustained_by(card_).mma_share;
  // Bytes: of an element of x's dtype, of T, and of partial sums. Elements of the factors.
  const double e_ = element_bytes(p_), t_ = e_ * area(p_.m, plan_.columns);
  const double z_ = kFloat * plan_.t_sums() * area(p_.m, plan_.columns);
  const double g_a_ = kFloat * plan_.dlora_a.splits * area(plan_.columns, p_.k);
  const double g_b_ = kFloat * plan_.dlora_b.splits * area(plan_.columns, p_.n);
  const double factors_ = area(p_.rank, p_.k + p_.n);
};

// One launch, in which T B^T follows when S is complete: a chain as long as that of two, and longer
// by one for each five times that T B^T waits for loads of B.
void add_decode(Launches& launches, const Card& card, const Problem& p, const Decode& plan) {
  const DecodeTile& tile = decode_tile_for(p.m);
  const double e = element_bytes(p), of_factors = p.float_adapters ? kFloat : e;
  const double factors = static_cast<double>(p.adapters()) * area(p.rank, p.k + p.n);
  const double bytes = e * (area(p.n, p.k) + area(p.m, p.k + p.n)) + of_factors * factors;
  const double loop = area((plan.tiles + plan.s_tiles) * tile.rows, p.k);
  const double flop = 2 * loop * static_cast<double>(plan.batch);
  const double loop_us = e * loop / (1e3 * kDecodeBytesPerNs * plan.blocks);
  const int64_t waits =
      blocks_of(p.adapters() * blocks_of(p.rank, 16), decode_pieces(tile, p.float_adapters));
  if (p.groups && p.groups->listed) launches.push_back({"lora_grouped_entries"});
  launches.push_back({"lora_decode", bytes, flop,
                      flop / (loop_us * 1e6 * sustained_by(card).tflops), card.sms,
                      1 + blocks_of(waits, 5)});
}

}  // namespace

// By the last generation that is not newer than the card.
Sustained sustained_by(const Card& card) {
  const bool geforce = card.name.find("GeForce") != std::string::npos;
  const Generation* known = &kGenerations[0];
  for (const Generation& each : kGenerations)
    if (each.arch <= card.arch && (geforce || !each.geforce)) known = &each;
  Sustained rates = known->rates;
  const double sms = static_cast<double>(card.sms) / known->sms;
  rates.tflops *= sms, rates.dram_gb_s *= sms;
  return rates;
}

double Launch::us(const Card& card) const {
  const Sustained rates = sustained_by(card);
  const auto slots = static_cast<double>(rounded_up(blocks, card.sms));
  const double products = flop / (share * rates.tflops * 1e6) * slots / static_cast<double>(blocks);
  return std::max(products, bytes / (rates.dram_gb_s * 1e3)) +
         static_cast<double>(launches) * rates.launch_us;
}

Launches launches_of(const Plan& plan) {
  const Problem& p = plan.problem;
  Launches launches;
  if (p.dropout && !p.backward) launches.push_back({"seed", 0, 0, 1, 1, 1, kHostLibraryUs});
  if (!plan.has_kernels()) {
    add_library_launches(launches, plan.card, p);
    return launches;
  }
  // Of Y and S, or of dX and gradients; and of the workspace.
  const int64_t listed = p.groups && p.groups->listed ? p.groups->count : 1;
  const auto count = static_cast<double>(p.backward ? 2 + 2 * listed : 3);
  launches.push_back({"allocations", 0, 0, 1, 1, 0, kHostAllocationUs * count});
  if (plan.tiled() != nullptr) TiledLaunches(launches, plan).add();
  if (plan.decode() != nullptr) add_decode(launches, plan.card, p, *plan.decode());
  return launches;
}

PredictedUs predict(const Plan& plan) {
  double device = 0, host = kHostCallUs;
  for (const Launch& launch : launches_of(plan))
    device += launch.us(plan.card), host += launch.host_us;
  return {device, std::max(device, host)};
}

}  // namespace lora_ext::plan
