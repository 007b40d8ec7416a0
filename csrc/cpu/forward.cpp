// Forward: the passes over the segments (the rows of one adapter each), over threads.
//
//     Y = X W^T + bias (base)     for each piece of rows: S = shrink(X, A_g), Y += s_g S B_g^T
//
// With few rows of one adapter S is split over rows, or with one row over ranks, and Y over columns.
//
// Where the base is multiplied by panels and adapters have enough rows, Y += is part of its pass
// (cpu/fused_product.h), over the rows in the order of the segments.
//
// A thread packs an adapter's factors once for consecutive pieces, into its own memory: packed
// factors of all adapters never exist at a time.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/passes.h"

namespace lora_ext::cpu {
namespace {

class ForwardPass {
 public:
  ForwardPass(const ForwardArgs& args, const Experts* experts)
      : args_(args), experts_(experts), groups_(args, experts), s_(empty_s()) {}

  Forward run() {
    if (!groups_.panel()) {
      y_ = forward_of_base(args_.x, args_.base, experts_);
      if (groups_.is_one_of_few_rows()) {
        make_s_and([](Thread&, const RowPiece&, const float*) {}, 0);
        expand_columns();
      } else {
        make_s_and(
            [&](Thread& own, const RowPiece& piece, const float* t) { expand(own, piece, t); },
            args_.update.out_features());
      }
      return {y_, s_};
    }
    const std::vector<int32_t> order = groups_.order_of_all(args_.x.size(0));
    const bool is_dense = groups_.is_dense(s_);
    const at::Tensor t = is_dense ? s_ : empty_s();
    LowRank low_rank = low_rank_of(groups_, order, t, true);
    low_rank.makes_t = makes_own_t(groups_, experts_, args_.update.out_features(), true);
    at::Tensor kept;
    if (low_rank.makes_t && groups_.dropout().enabled()) {
      kept = drawn_mask(groups_.dropout(), low_rank.rows, args_.x.size(0), args_.x.size(1));
      low_rank.p_mask = bits_of(kept);
    }
    if (!low_rank.makes_t) {
      make_s_and(
          [&](Thread&, const RowPiece& piece, const float* rows) {
            if (is_dense) return;
            std::copy_n(rows, size_of(piece.rows) * piece.segment->rank,
                        Groups::dense_part(t, *piece.segment, piece.rows.begin));
          },
          0);
    }
    y_ = fused_product(args_.x, args_.base, experts_, *groups_.panel(), low_rank, true);
    if (low_rank.makes_t && !is_dense) {
      for (const Segment& segment : groups_.segments()) {
        groups_.scatter_s(s_, segment, {0, segment.count}, Groups::dense_part(t, segment, 0));
      }
    }
    return {y_, s_};
  }

 private:
  at::Tensor empty_s() const {
    return at::empty({args_.x.size(0), args_.update.rank()}, at::kFloat);
  }

  // S of each piece of rows, and then(thread, piece, S of the piece); its work is that of `columns`.
  template <class Then>
  void make_s_and(const Then& then, int64_t columns) {
    const RowPieces pieces = pieces_of_rows(groups_, args_.x.size(1) + columns);
    const int64_t threads = threads_for(work_of(pieces));
    c10::SmallVector<Thread, 1> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
      const Segment& segment = *piece.segment;
      const SkinnyKernels& kernels = *groups_.passes(segment).over_x;
      const Groups::Rows where = groups_.rows_of(segment, piece.rows);
      const int64_t count = size_of(piece.rows);
      Thread& own = state[static_cast<size_t>(thread)];
      float* in_place = groups_.s_in_place(s_, segment, piece.rows);
      float* t = in_place != nullptr
                     ? in_place + piece.ranks.begin
                     : static_cast<float*>(own.s.of(count * segment.rank * sizeof(float)));
      own.a.for_shrink(segment, ranks_of(groups_.a(segment), piece), kernels, groups_.few_rows());
      own.a.shrink(
          shrink_args(args_.x, where, own.a, groups_.keep_scale(), t, groups_.dropout_at(where, 0)),
          count);
      if (in_place == nullptr) groups_.scatter_s(s_, segment, piece.rows, t);
      then(own, piece, t);
    });
  }

  // Y += s_g S B_g^T
  void expand(Thread& own, const RowPiece& piece, const float* t) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
    const Groups::Rows where = groups_.rows_of(segment, piece.rows);
    const int64_t count = size_of(piece.rows);
    own.b.for_expand(segment, groups_.b(segment), kernels, groups_.few_rows());
    const void* packed = packed_t(kernels.expand_t, t, count, segment.rank, own.b.is_half(), own.t);
    own.b.expand(expand_args(y_, where, 0, own.b, groups_.scaling(segment), packed, Dropout{}),
                 count);
  }

  void expand_columns() {
    ColumnPieces pieces;
    const Segment& all = groups_.segments()[0];
    const int64_t columns = y_.size(1), per_column = work_of_column(all);
    add_columns(pieces, groups_, all, false, columns, per_column, per_column * columns);
    run_pieces(pieces, threads_for(work_of(pieces)), [&](int64_t, const ColumnPiece& piece) {
      Factor b;
      const ExpandArgs args =
          expand_args(y_, groups_, piece, b, groups_.b(all), *groups_.passes(all).over_y,
                      groups_.scaling(all), s_.const_data_ptr(), Dropout{});
      b.expand(args, all.count);
    });
  }

  const ForwardArgs& args_;
  const Experts* experts_;
  const Groups groups_;
  at::Tensor s_, y_;
};

}  // namespace

std::optional<Forward> forward(const ForwardArgs& args, const Experts* experts) {
  if (takes_library(args.x, args.y_dtype(), args.update)) return std::nullopt;
  return ForwardPass(args, experts).run();
}

}  // namespace lora_ext::cpu
