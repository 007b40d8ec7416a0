// The LoRA linear as a sequence of kernels: follows a plan (plan.h) on operands in one workspace.
//
//     forward    split A, B -> shrink: Z -> reduce: S, T -> gemm: Y
//     backward   split A, B, S -> dsdb: Z, G_B  (or shrink: Z) -> reduce: T = dS -> gemm: dX
//                -> wgrad: G_A (and G_B) -> reduce_wgrad: dA, dB
//     few rows   decode: S, T, Y
//
// In a hybrid plan gemm leaves out the base product, which the library then accumulates onto Y and
// dX.
//
// This file decides the order of the kernels, their instances and grids; sequence/linear_params.h
// has their parameters. A launcher is called as launch(kernel, grid, threads, shared bytes,
// parameters), with true as a last argument for a launch with PDL; for gemm on wgmma see
// gemm/sm90a/launch.h; launch.clear(flags, count) sets flags to zero. The launcher decides where
// kernels run: csrc/kernels/launch/ on a stream of a GPU, tests/emulated/ in the execution layer.
#pragma once
#include "kernels/decode/launch.h"
#include "kernels/gemm/sm80/kernel.h"
#include "kernels/gemm/sm90a/launch.h"
#include "kernels/sequence/linear_params.h"
#include "kernels/skinny/dsdb.h"
#include "kernels/skinny/shrink.h"
#include "kernels/skinny/wgrad.h"

namespace lora_ext::kernel {

template <class Tile>
constexpr bool is_as_planned(const plan::TileFacts& facts) {
  return facts.rows == Tile::kM && facts.columns == Tile::kN && facts.shared == Tile::kSharedBytes;
}
static_assert(is_as_planned<LoraGemmTile128x128>(plan::facts_of(plan::Tile::k128x128)));
static_assert(is_as_planned<LoraGemmTile128x128Deep>(plan::facts_of(plan::Tile::kDeep128x128)));
static_assert(is_as_planned<LoraGemmTile128x64>(plan::facts_of(plan::Tile::k128x64)));

template <class T, class Launch>
class LoraLinearSequence {
 public:
  LoraLinearSequence(const plan::Tiled& plan, const LoraLinearOperands& operands, Launch& launch)
      : plan_(plan), params_(plan, operands), dropout_(operands.dropout), launch_(launch) {}

  void forward(const LoraLinearForward& f) {
    split(params_.split(/*a=*/true, /*b=*/true, nullptr));
    shrink<false>(params_.shrink(), dropout_);
    reduce(params_.reduce(f.s));
    gemm<false, false>(params_.gemm(f));
  }

  void backward(const LoraLinearBackward& g) {
    const bool need_ds = g.dx != nullptr || g.da != nullptr;
    split(params_.split(g.dx != nullptr, need_ds, g.db != nullptr ? g.s : nullptr));
    if (plan_.one_pass()) {
      dsdb(params_.dsdb(g));
    } else if (need_ds) {
      shrink<true>(params_.shrink(g), false);
    }
    if (need_ds) reduce(params_.reduce());
    if (g.dx != nullptr) dx(g);
    wgrad(params_.wgrad(g));
    reduce_wgrad(params_.reduce_wgrad(g));
  }

 private:
  using Params = LoraLinearParams<T>;

  void dx(const LoraLinearBackward& g) {
    const LoraGemmParams<T> params = params_.gemm(g);
    dropout_ ? gemm<true, true>(params) : gemm<true, false>(params);
  }

  static unsigned blocks_of(int64_t count, int64_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
  }
  // For kernels with one thread per element and a grid-stride loop.
  static unsigned blocks_for(int64_t elements) {
    constexpr int64_t kMaxBlocks = 2048;
    return static_cast<unsigned>(std::min<int64_t>((elements + 255) / 256, kMaxBlocks));
  }

  void split(const typename Params::Split& split) {
    if (split.matrices == 0) return;
    launch_(lora_split<T>, dim3(blocks_for(split.max_elements), split.matrices), 256, 0,
            split.params);
  }

  template <bool kMNMajor>
  void shrink(const LoraShrinkParams<T>& params, bool masked) {
    using Tile = LoraShrinkTile;
    const dim3 grid(blocks_of(params.m, Tile::kM), blocks_of(params.columns, Tile::kN),
                    static_cast<unsigned>(plan_.shrink.splits));
    constexpr bool kMaybeMasked = !kMNMajor;  // X may be, dY is not
    with_alignment(plan_.vector, [&](auto alignment) {
      launch_(masked ? lora_shrink_sm80<T, kMNMajor, kMaybeMasked, alignment>
                     : lora_shrink_sm80<T, kMNMajor, false, alignment>,
              grid, Tile::kThreads, Tile::kSlabs, params);
    });
  }

  void reduce(const LoraReduceParams<T>& params) {
    launch_(lora_reduce<T>, dim3(blocks_for(int64_t{params.m} * params.width)), 256, 0, params);
  }

  template <bool kMNMajor, bool kMasked>
  void gemm(const LoraGemmParams<T>& params) {
    const plan::Gemm& gemm = *plan_.gemm;
    if (plan::facts_of(gemm.tile).wgmma)
      return launch_lora_gemm_sm90a<T>(
          params, {gemm.tile, kMNMajor, kMasked, gemm.use_pdl, gemm.max_blocks}, launch_);
    switch (gemm.tile) {
      case plan::Tile::k128x128:
        return gemm_sm80<LoraGemmTile128x128, kMNMajor, kMasked>(params);
      case plan::Tile::kDeep128x128:
        return gemm_sm80<LoraGemmTile128x128Deep, kMNMajor, kMasked>(params);
      default:
        return gemm_sm80<LoraGemmTile128x64, kMNMajor, kMasked>(params);
    }
  }
  template <class Tile, bool kMNMajor, bool kMasked>
  void gemm_sm80(const LoraGemmParams<T>& params) {
    launch_(lora_gemm_sm80<T, Tile, kMNMajor, kMasked>,
            dim3(static_cast<unsigned>(plan_.gemm->blocks)), Tile::kThreads, Tile::kSharedBytes,
            params);
  }

  void dsdb(const LoraDsdbParams<T>& params) {
    plan_.columns <= 16 ? dsdb_of<16>(params) : dsdb_of<32>(params);
  }
  template <int kColumns>
  void dsdb_of(const LoraDsdbParams<T>& params) {
    using Tile = LoraDsdbTile<kColumns>;
    const dim3 grid(static_cast<unsigned>(plan_.panels),
                    static_cast<unsigned>(plan_.dlora_b.splits));
    with_alignment(plan_.vector, [&](auto alignment) {
      launch_(lora_dsdb_sm80<T, kColumns, alignment>, grid, Tile::kThreads, Tile::kSharedBytes,
              params);
    });
  }

  void wgrad(const typename Params::Wgrad& wgrad) {
    if (wgrad.products == 0) return;
    using Tile = LoraWgradTile;
    const dim3 grid(blocks_of(wgrad.widest, Tile::kC), blocks_of(plan_.columns, Tile::kColumns),
                    wgrad.splits);
    with_alignment(plan_.vector, [&](auto alignment) {
      // The masked instance also if only dB is wanted: only that one was checked.
      launch_(dropout_ ? lora_wgrad_sm80<T, true, alignment> : lora_wgrad_sm80<T, false, alignment>,
              grid, Tile::kThreads, Tile::kSharedBytes, wgrad.params, plan_.wgrad_uses_pdl);
    });
  }

  void reduce_wgrad(const typename Params::ReduceWgrad& sums) {
    if (sums.gradients == 0) return;
    launch_(lora_reduce_wgrad<T>, dim3(blocks_for(sums.max_elements), sums.gradients), 256, 0,
            sums.params);
  }

  const plan::Tiled& plan_;
  const Params params_;
  const bool dropout_;
  Launch& launch_;
};

// Functions rather than members of the class: member functions defined in a class are inline, and
// their kernels would be compiled wherever they are called.
template <class T, class Launch>
void launch_lora(const plan::Plan& plan, const LoraLinearForward& f, Launch& launch) {
  const plan::Decode* decode = plan.decode();
  if (decode == nullptr) return LoraLinearSequence<T, Launch>(*plan.tiled(), f, launch).forward(f);
  const LoraDecodeParams<T> params = lora_decode_params<T>(*decode, f);
  const bool clear = f.counts == nullptr;
  f.float_adapters ? launch_lora_decode<T, float>(*decode, params, clear, launch)
                   : launch_lora_decode<T, T>(*decode, params, clear, launch);
}

template <class T, class Launch>
void launch_lora(const plan::Plan& plan, const LoraLinearBackward& g, Launch& launch) {
  LoraLinearSequence<T, Launch>(*plan.tiled(), g, launch).backward(g);
}

}  // namespace lora_ext::kernel
