// The LoRA linear with many adapters as a sequence of kernels: follows a plan (plan.h) on operands
// in one workspace.
//
//     few rows   entries -> decode: S, T, Y
//     forward    entries -> count, scan, place -> shrink: Z -> reduce: S, T -> gemm: Y
//     backward   entries -> count, scan, place -> shrink: Z -> reduce: T = dS, and s S -> gemm: dX
//                -> wgrad: dA, dB, or partial sums -> reduce_wgrad: dA, dB
//
// Without a list there are no entries to write; without an index, count and place are left out, and
// scan where tables are given. In a hybrid plan gemm leaves out the base product, which the library
// then accumulates onto Y and dX. Launches with own weights that go on with others, or have T, are
// gemm alone.
// The interface of a launcher is that of sequence/linear_sequence.h.
#pragma once
#include "kernels/decode/launch.h"
#include "kernels/grouped/own_weights_sm90a.h"
#include "kernels/sequence/grouped_params.h"

namespace lora_ext::kernel {

// The tables of lists of matrices, one after the other; none for pools.
template <class T, class Launch>
void write_entries(std::initializer_list<const LoraGroupedEntry*> lists, int groups,
                   LoraGroupedEntry* to, Launch& launch) {
  if (to == nullptr) return;
  using Params = LoraGroupedEntriesParams;
  const int count = static_cast<int>(lists.size()) * groups;
  for (int first = 0; first < count; first += Params::kMax) {
    Params params{};
    params.count = std::min(count - first, Params::kMax), params.to = to + first;
    for (int i = 0; i < params.count; ++i)
      params.entries[i] = lists.begin()[(first + i) / groups][(first + i) % groups];
    launch(lora_grouped_entries<T>, dim3(1), Params::kMax, 0, params);
  }
}

// F is the type of the factors, float or T.
template <class T, class F, class Launch>
class LoraGroupedSequence {
 public:
  LoraGroupedSequence(const plan::Tiled& plan, const LoraGroupedOperands& operands, Launch& launch)
      : plan_(plan), o_(operands), params_(plan, operands), launch_(launch) {}

  void forward(const LoraGroupedForward& f) {
    if (!o_.goes_on() && o_.t == nullptr) {
      write_entries<T>({o_.factors.list}, o_.rows.groups, params_.entries(), launch_);
      segments();
      shrink<false>(params_.shrink(), o_.dropout);
      reduce(params_.reduce(f));
    }
    plan_.tables->own_weights() ? own_weights<false, false>(params_.own_weights(f))
                                : gemm<false, false>(params_.gemm(f));
  }

  void backward(const LoraGroupedBackward& g) {
    if (o_.goes_on()) return dx(g);
    const bool wants_wgrad = g.need_da || g.need_db;
    wants_wgrad ? write_entries<T>({o_.factors.list, g.gradients.list}, o_.rows.groups,
                                   params_.entries(), launch_)
                : write_entries<T>({o_.factors.list}, o_.rows.groups, params_.entries(), launch_);
    segments();
    if (g.dx != nullptr || g.need_da) shrink<true>(params_.shrink(g), false);
    reduce(params_.reduce(g));
    if (g.dx != nullptr) dx(g);
    if (wants_wgrad) wgrad(g);
  }

 private:
  static unsigned blocks_of(int64_t count, int64_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
  }

  void segments() {
    if (o_.tables != nullptr) return;
    using Params = LoraGroupedSegmentsParams;
    const Params params = params_.segments();
    const dim3 chunks(blocks_of(o_.m, Params::kChunk));
    const auto run = [&](auto kernel, dim3 grid) {
      launch_(kernel, grid, Params::kThreads, Params::kSharedBytes, params);
    };
    if (o_.rows.index != nullptr) run(lora_grouped_count<T>, chunks);
    run(lora_grouped_scan<T>, dim3(1));
    if (o_.rows.index != nullptr) run(lora_grouped_place<T>, chunks);
  }

  template <bool kMNMajor>
  void shrink(const LoraGroupedShrinkParams<T>& params, bool masked) {
    plan_.tables->own_weights() ? shrink_by<T, kMNMajor>(params, masked)
                                : shrink_by<F, kMNMajor>(params, masked);
  }
  template <class Factor, bool kMNMajor>
  void shrink_by(const LoraGroupedShrinkParams<T>& params, bool masked) {
    using Tile = LoraShrinkTile;
    const dim3 grid(static_cast<unsigned>(plan_.tables->tile_count),
                    blocks_of(params.z_pitch, Tile::kN),
                    static_cast<unsigned>(plan_.shrink.splits));
    constexpr bool kMaybeMasked = !kMNMajor;  // X may be, dY is not
    with_alignment(plan_.vector, [&](auto alignment) {
      launch_(masked ? lora_grouped_shrink_sm80<T, Factor, kMNMajor, kMaybeMasked, alignment>
                     : lora_grouped_shrink_sm80<T, Factor, kMNMajor, false, alignment>,
              grid, Tile::kThreads, Tile::kSlabs, params);
    });
  }

  void reduce(const LoraGroupedReduceParams<T>& params) {
    launch_(lora_grouped_reduce<T>,
            dim3(static_cast<unsigned>(plan_.tables->tile_count), params.count()), 256, 0, params);
  }

  void dx(const LoraGroupedBackward& g) { o_.dropout ? dx_of<true>(g) : dx_of<false>(g); }
  template <bool kMasked>
  void dx_of(const LoraGroupedBackward& g) {
    plan_.tables->own_weights() ? own_weights<true, kMasked>(params_.own_weights(g))
                                : gemm<true, kMasked>(params_.gemm(g));
  }

  // Of dX W is MN-major as the linear layer stores it.
  template <bool kOfDx, bool kMasked>
  void own_weights(const LoraOwnWeightsParams<T>& params) {
    if (plan::facts_of(plan_.gemm->tile).wgmma)
      return launch_own_weights_sm90a(params, kOfDx == plan_.weight_row_major, kOfDx, kMasked,
                                      plan_.gemm->blocks, launch_);
    plan_.weight_row_major ? own_weights_on<kOfDx, kOfDx, kMasked>(params)
                           : own_weights_on<!kOfDx, kOfDx, kMasked>(params);
  }
  template <bool kMNMajor, bool kUMNMajor, bool kMasked>
  void own_weights_on(const LoraOwnWeightsParams<T>& params) {
    using Small = LoraGemmTile128x64;
    // As plan::has_experts_kernel says: others would spill.
    using Large = std::conditional_t<kMNMajor == kUMNMajor, LoraGemmTile128x128, Small>;
    using Deep = std::conditional_t<kMNMajor == kUMNMajor, LoraGemmTile128x128Deep, Small>;
    const plan::Tile tile = plan_.gemm->tile;
    tile == plan::Tile::k128x128 ? own_weights_of<Large, kMNMajor, kUMNMajor, kMasked>(params)
    : tile == plan::Tile::kDeep128x128
        ? own_weights_of<Deep, kMNMajor, kUMNMajor, kMasked>(params)
        : own_weights_of<Small, kMNMajor, kUMNMajor, kMasked>(params);
  }
  template <class Tile, bool kMNMajor, bool kUMNMajor, bool kMasked>
  void own_weights_of(const LoraOwnWeightsParams<T>& params) {
    launch_(lora_grouped_gemm_own_weights_sm80<T, Tile, kMNMajor, kUMNMajor, kMasked>,
            dim3(static_cast<unsigned>(plan_.gemm->blocks)), Tile::kThreads, Tile::kSharedBytes,
            params);
  }

  template <bool kMNMajor, bool kMasked>
  void gemm(const LoraGroupedGemmParams<T>& params) {
    plan_.gemm->tile == plan::Tile::kDeep128x128
        ? gemm_of<LoraGemmTile128x128Deep, kMNMajor, kMasked>(params)
        : gemm_of<LoraGemmTile128x64, kMNMajor, kMasked>(params);
  }
  template <class Tile, bool kMNMajor, bool kMasked>
  void gemm_of(const LoraGroupedGemmParams<T>& params) {
    launch_(lora_grouped_gemm_sm80<T, F, Tile, kMNMajor, kMasked>,
            dim3(static_cast<unsigned>(plan_.gemm->blocks)), Tile::kThreads, Tile::kSharedBytes,
            params);
  }

  void wgrad(const LoraGroupedBackward& g) {
    using Tile = LoraWgradTile;
    const LoraGroupedWgradParams<T> params = params_.wgrad(g);
    constexpr int kColumns = LoraGroupedWgradSm80<T, F, false, Alignment::kVector>::kColumns;
    const int c_tiles = params.product[0].c_tiles + params.product[1].c_tiles;
    const dim3 grid(static_cast<unsigned>(plan_.tables->piece_count),
                    static_cast<unsigned>(c_tiles), blocks_of(o_.rows.max_rank, kColumns));
    with_alignment(plan_.vector, [&](auto alignment) {
      launch_(o_.dropout ? lora_grouped_wgrad_sm80<T, F, true, alignment>
                         : lora_grouped_wgrad_sm80<T, F, false, alignment>,
              grid, Tile::kThreads, Tile::kSharedBytes, params);
    });
    // Most adapters have one piece, and nothing to sum.
    constexpr unsigned kBlocks = 16;
    launch_(lora_grouped_reduce_wgrad<T, F>,
            dim3(static_cast<unsigned>(o_.rows.groups), kBlocks, 2), 256, 0,
            params_.reduce_wgrad(g));
  }

  const plan::Tiled& plan_;
  const LoraGroupedOperands& o_;
  const LoraGroupedParams<T> params_;
  Launch& launch_;
};

// Few rows.
template <class T, class F, class Launch>
void decode_lora_grouped(const plan::Decode& plan, const LoraGroupedForward& f, Launch& launch) {
  auto* entries = plan.entries == plan::kNone
                      ? nullptr
                      : reinterpret_cast<LoraGroupedEntry*>(f.workspace + plan.entries);
  write_entries<T>({f.factors.list}, f.rows.groups, entries, launch);
  launch_lora_decode<T, F>(plan, lora_decode_params<T>(plan, f, entries), f.counts == nullptr,
                           launch);
}

// Functions as in sequence/linear_sequence.h, so that their kernels are compiled in one place.
template <class T, class Launch>
void launch_lora(const plan::Plan& plan, const LoraGroupedForward& f, Launch& launch) {
  if (const plan::Decode* decode = plan.decode())
    return f.float_adapters ? decode_lora_grouped<T, float>(*decode, f, launch)
                            : decode_lora_grouped<T, T>(*decode, f, launch);
  f.float_adapters ? LoraGroupedSequence<T, float, Launch>(*plan.tiled(), f, launch).forward(f)
                   : LoraGroupedSequence<T, T, Launch>(*plan.tiled(), f, launch).forward(f);
}

template <class T, class Launch>
void launch_lora(const plan::Plan& plan, const LoraGroupedBackward& g, Launch& launch) {
  g.float_adapters ? LoraGroupedSequence<T, float, Launch>(*plan.tiled(), g, launch).backward(g)
                   : LoraGroupedSequence<T, T, Launch>(*plan.tiled(), g, launch).backward(g);
}

}  // namespace lora_ext::kernel
