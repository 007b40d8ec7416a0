#include "kernels/plan/problem.h"
#include "op/check/kernel_check.h"

namespace lora_ext::kernel_set {
namespace {

// The rank tails that are checked. One pass over dY is used for few columns.
std::vector<int> tails_of(const Kernels& kernels) {
  if (!plan::facts_of(kernels.tile).wgmma) return {0};
  if (!kernels.one_pass) return {1, 4};
  return {kernels.wide && !kernels.float_adapters ? 4 : 1};
}

// lora_decode runs in a forward only, and without dropout.
void add_decode(Kernels kernels, std::vector<Kernels>& all) {
  kernels.tile = plan::Tile::kDecode, kernels.vector = true;
  kernels.uses_pdl = false, kernels.tail = 0;
  for (const plan::DecodeTile& tile : plan::kDecodeTiles) {
    kernels.rows = static_cast<int>(tile.batch);
    all.push_back(kernels);
  }
}

// The sets for one dtype of adapters and activations and one value of dropout: with each tile, and
// for the hybrid route.
void add_tiles(const plan::Card& card, bool use_pdl, Kernels kernels, std::vector<Kernels>& all) {
  const plan::Call call{kernels.backward, kernels.float_adapters, kernels.dropout};
  for (const plan::Tile tile : plan::tiles_of(card, call)) {
    if (tile == plan::Tile::kDecode) {
      add_decode(kernels, all);
      continue;
    }
    kernels.tile = tile, kernels.vector = true;
    kernels.uses_pdl = use_pdl && plan::facts_of(tile).wgmma;
    for (const int tail : tails_of(kernels)) {
      kernels.tail = tail;
      all.push_back(kernels);
    }
  }
  kernels.tile = plan::Tile::k128x64, kernels.hybrid = true, kernels.tail = 0;
  kernels.uses_pdl = false;
  for (const bool vector : {true, false}) {
    kernels.vector = vector;
    for (const bool given_base : {false, true}) {
      kernels.given_base = given_base;
      if (!given_base || !kernels.backward) all.push_back(kernels);
    }
  }
}

void add_experts(const plan::Card& card, Kernels kernels, std::vector<Kernels>& all) {
  if (kernels.tail == 4) return;  // a kernel for all
  kernels.experts = true, kernels.tail = 0;
  for (const bool transposed : {false, true}) {
    kernels.transposed = transposed;
    for (const bool vector : {true, false}) {
      kernels.vector = vector;
      if (plan::has_experts_kernel(kernels.tile, card, vector, transposed)) all.push_back(kernels);
    }
  }
}

// A rank that gives up to 16 columns, up to 32, or more, with an adapter in one half or in two; and
// the requested tail.
int64_t rank_for(const Kernels& kernels) {
  if (kernels.one_pass) return !kernels.wide ? 8 : kernels.float_adapters ? 12 : 20;
  return kernels.tail == 1 || kernels.experts ? 72 : 40;
}

}  // namespace

std::string Kernels::name() const {
  std::string text = backward ? "backward" : "forward";
  text += std::string(" ") + kernel_dtype(dtype).name + " ";
  text += hybrid ? "hybrid" : plan::facts_of(tile).name;
  if (!vector) text += " element-wise";
  if (float_adapters) text += " float32 adapters";
  if (dropout) text += " dropout";
  if (one_pass) text += " one pass";
  if (wide) text += " wide";
  if (tail != 0) text += " tail " + std::to_string(tail);
  if (uses_pdl) text += " PDL";
  if (given_base) text += " onto a base";
  if (grouped) text += experts ? " experts" : " many adapters";
  if (transposed) text += " transposed";
  if (rows != 0) text += " up to " + std::to_string(rows) + " rows";
  return text;
}

Kernels of_plan(const plan::Plan& plan, const plan::Problem& problem) {
  Kernels kernels{};
  kernels.backward = problem.backward, kernels.dtype = problem.dtype;
  kernels.float_adapters = problem.float_adapters, kernels.dropout = problem.dropout;
  kernels.grouped = problem.groups.has_value();
  kernels.experts = kernels.grouped && problem.groups->own_weights;
  kernels.transposed = kernels.experts && !problem.weight_row_major;
  if (const plan::Decode* decode = plan.decode()) {
    kernels.tile = plan::Tile::kDecode, kernels.vector = true, kernels.rows = decode->batch;
    return kernels;
  }
  const plan::Tiled& tiled = *plan.tiled();
  kernels.tile = tiled.gemm ? tiled.gemm->tile : plan::Tile::k128x64;  // dX may not be needed
  kernels.hybrid = plan.hybrid(), kernels.vector = tiled.vector;
  kernels.one_pass = tiled.one_pass(), kernels.wide = tiled.one_pass() && tiled.columns > 16;
  if (tiled.gemm && plan::facts_of(kernels.tile).wgmma && !kernels.experts)
    kernels.tail = plan::tail_of(tiled.width);
  kernels.uses_pdl = (tiled.gemm && tiled.gemm->use_pdl) || tiled.wgrad_uses_pdl;
  kernels.given_base = !problem.backward && tiled.base == plan::Base::kGiven;
  return kernels;
}

std::vector<Kernels> all_of(const plan::Card& card, bool use_pdl) {
  struct Dsdb {
    bool one_pass, wide;
  };
  std::vector<Kernels> all;
  if (card.arch < 80) return all;
  for (const KernelDtype& type : kKernelDtypes) {
    for (const bool float_adapters : {false, true}) {
      for (const bool dropout : {false, true}) {
        Kernels kernels{};
        kernels.dtype = type.dtype, kernels.float_adapters = float_adapters;
        kernels.dropout = dropout;
        add_tiles(card, use_pdl, kernels, all);
        kernels.backward = true;
        for (const Dsdb dsdb : {Dsdb{false, false}, Dsdb{true, false}, Dsdb{true, true}}) {
          kernels.one_pass = dsdb.one_pass, kernels.wide = dsdb.wide;
          add_tiles(card, use_pdl, kernels, all);
        }
      }
    }
  }
  return all;
}

// Without PDL: kernels for many adapters do not use it.
std::vector<Kernels> all_grouped_of(const plan::Card& card) {
  std::vector<Kernels> all;
  for (Kernels& each : all_of(card, false)) {
    if (each.one_pass) continue;
    each.grouped = true;
    if (plan::has_grouped_kernel(each.tile)) all.push_back(each);
    if (!each.hybrid) add_experts(card, each, all);
  }
  return all;
}

// Rows, columns and depth are not divisible by any tile; there are enough columns for one pass over
// dY, and the last pair of row blocks is half empty. An odd depth and width make rows unaligned.
//
// Two blocks, or two clusters, compute all tiles, so each computes a second tile: stages are used
// again, and both consumers of a pingpong tile work.
//
// lora_decode runs with four blocks, which share most tiles, and with three rows fewer than its
// instance takes.
SmallCase small_case(const Kernels& kernels) {
  SmallCase small{{264, kernels.vector ? 536 : 531, kernels.vector ? 264 : 259, rank_for(kernels)},
                  {kernels.hybrid ? plan::Choice::kHybrid : plan::Choice::kKernel}};
  if (!kernels.hybrid) small.request.tile = kernels.tile;
  small.request.use_pdl = kernels.uses_pdl;
  small.request.max_blocks = plan::facts_of(kernels.tile).wgmma ? 4 : 2;
  plan::Problem& problem = small.problem;
  if (kernels.rows != 0) problem.m = kernels.rows - 3, small.request.max_blocks = 4;
  problem.backward = kernels.backward, problem.dtype = kernels.dtype;
  problem.float_adapters = kernels.float_adapters, problem.dropout = kernels.dropout;
  problem.given_base = kernels.given_base, problem.weight_row_major = !kernels.transposed;
  if (kernels.grouped) problem.groups = plan::Groups{3, !kernels.experts, false, kernels.experts};
  problem.aligned = problem.aligned_weight = problem.aligned_a = kernels.vector;
  const Dtype adapter = kernels.float_adapters ? Dtype::kFloat32 : kernels.dtype;
  problem.aligned_b = problem.rank * element_size(adapter) % 16 == 0;
  return small;
}

}  // namespace lora_ext::kernel_set
