// The layer in one pass by vdpbf16ps (TileWalk in cpu/fused_gemm.h).
// Included by isa_avx512_bf16.cpp after its target pragma, inside its anonymous namespace.
//
//     make_t, for each 14 rows:  copy P's rows by steps of the depth, T of the copy
//     run, for each task:        pack Q's columns, once for consecutive tasks with the same ones
//       for each 14 rows:        copy P's rows, T of them in two terms of bfloat16 behind
//         for each 32 columns:   sums over the whole depth, += T U as more of it, store
//
// No sum leaves the registers before it is rounded, but where a block has rows of several adapters,
// and under dropout of dX, whose mask selects from sums of T U alone.
#pragma once

// What is packed of a row, in elements: steps of P, then steps of T.
struct DotLayout {
  int64_t steps, t_steps, rank;

  explicit DotLayout(const FusedProduct& product)
      : steps(round_up(product.depth, kTileDepth) / kTileDepth), t_steps(0), rank(0) {
    for (const RowUpdate& update : product.updates) {
      const int64_t depth = expand_depth(update.u.rank, update.u.dtype == Dtype::kBFloat16);
      t_steps = std::max(t_steps, depth / kTileDepth);
      rank = std::max(rank, update.u.rank);
    }
  }
  int64_t row() const { return (steps + t_steps) * kTileDepth; }
};

// P's rows from m on, by steps of the depth: [steps, count, 32], zeros past the depth and where a
// mask drops.
template <bool kIsMasked>
void copy_rows(const FusedProduct& product, int64_t m, int64_t count, BFloat16* to) {
  const auto* p = static_cast<const BFloat16*>(product.p);
  const int64_t whole = product.depth / kTileDepth;
  const int64_t steps = round_up(product.depth, kTileDepth) / kTileDepth;
  const MaskBits keep = kIsMasked ? product.p_mask.at(m, 0) : MaskBits{};
  for (int64_t i = 0; i < count; ++i) {
    const BFloat16* row = p + product.p_rows[m + i] * product.p_pitch;
    BFloat16* out = to + i * kTileDepth;
    for (int64_t k = 0; k < steps; ++k, out += count * kTileDepth) {
      __mmask32 exists = k < whole ? 0xFFFFFFFFu : first_halves(product.depth % kTileDepth);
      if (kIsMasked) exists &= keep.words[i * keep.pitch + k];
      _mm512_store_si512(out, _mm512_maskz_loadu_epi16(exists, row + k * kTileDepth));
    }
  }
}

// ---- T ----

// The memory of a thread that makes T, from its start in bytes; all multiples of 64.
struct DotTMemory {
  int64_t factor, rows, sums;

  explicit DotTMemory(const FusedProduct& product) {
    const DotLayout layout(product);
    factor = shrink_panel_bytes(layout.rank, product.depth);  // of both dtypes
    rows = layout.steps * kDotRows * kTileDepth * kHalfBytes;
    sums = kDotRows * kTileRows * kFloatBytes;
  }
  int64_t bytes() const { return factor + rows + sums; }
};

class DotTMaker {
 public:
  DotTMaker(const FusedProduct& product, char* memory) : product_(product) {
    const DotTMemory sizes(product);
    const auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    factor_ = reinterpret_cast<BFloat16*>(take(sizes.factor));
    rows_ = reinterpret_cast<BFloat16*>(take(sizes.rows));
    sums_ = reinterpret_cast<float*>(take(sizes.sums));
  }

  // At most 14 rows from m on.
  void run(int64_t m, int64_t count) {
    Span spans[kDotRows];
    const int64_t num_spans = spans_of(product_.updates, m, count, spans);
    product_.p_mask.words == nullptr ? copy_rows<false>(product_, m, count, rows_)
                                     : copy_rows<true>(product_, m, count, rows_);
    for (int64_t i = 0; i < num_spans; ++i) {
      const auto [rows, update] = spans[i];
      const DotRows own{rows_ + (rows.begin - m) * kTileDepth, count * kTileDepth};
      if (update != nullptr) make(*update, rows, own);
    }
  }

 private:
  // The factor's panel, packed once for consecutive rows of an adapter.
  void pack_factor(const AdapterView& q) {
    const bool is_same = packed_.data == q.data && packed_.rank == q.rank &&
                         packed_.rank_pitch == q.rank_pitch && packed_.col_pitch == q.col_pitch &&
                         packed_.dtype == q.dtype;
    packed_ = q;
    if (is_same) return;
    q.dtype == Dtype::kBFloat16 ? pack_shrink(q, factor_)
                                : product_.kernels.skinny->pack_shrink(q, factor_);
  }

  void make(const RowUpdate& update, Range rows, DotRows p) {
    const AdapterView& q = update.q;
    pack_factor(q);
    const int64_t count = rows.end - rows.begin, ranks = round_up(q.rank, kTileRows);
    const bool is_half = q.dtype == Dtype::kBFloat16;
    float* t = update.t + (rows.begin - update.rows.begin) * q.rank;
    const __m512 scale = _mm512_set1_ps(update.t_scale);
    for (int64_t j = 0; j < q.rank; j += kTileRows) {
      const DotRanks some{factor_ + j * (is_half ? kTileDepth : kFloatBytes / kHalfBytes),
                          is_half ? ranks * kTileDepth : ranks, is_half};
      dots_of(count).shrink(p, some, product_.depth, sums_);
      const auto exists = static_cast<__mmask16>(first_halves(q.rank - j));
      for (int64_t i = 0; i < count; ++i) {
        _mm512_mask_storeu_ps(t + i * q.rank + j, exists,
                              _mm512_mul_ps(_mm512_load_ps(sums_ + i * kTileRows), scale));
      }
    }
  }

  const FusedProduct& product_;
  AdapterView packed_{};
  BFloat16 *factor_, *rows_;
  float* sums_;
};

void dot_make_t(const FusedProduct& product, const WalkShare& share) {
  DotTMaker maker(product, share.memory);
  for (const ProductTask* task = share.begin; task != share.end; ++task) {
    for (int64_t m = task->rows.begin; m < task->rows.end; m += kDotRows) {
      maker.run(m, std::min<int64_t>(kDotRows, task->rows.end - m));
    }
  }
}

// ---- columns of Y ----

// Few rows of a part are packed once for consecutive tasks, which have them all, at most 2.4 MB; more
// are packed 14 at a time for each group of columns: a hundredth of their product's time.
inline bool keeps_rows(int64_t depth, int64_t rows) {
  constexpr int64_t kMostRows = 20 * kDotRows, kMostElements = 1200 << 10;
  return rows <= kMostRows && round_up(rows, kDotRows) * depth <= kMostElements;
}

// The memory of a thread that multiplies; the same.
struct DotMemory {
  int64_t rows, q, u, p, terms, sums, added, pitch;
  bool keeps;  // rows

  DotMemory(const FusedProduct& product, const WalkTasks& tasks) {
    const DotLayout layout(product);
    const int64_t blocks = round_up(tasks.cols, kRowBlock) / kRowBlock;
    const int64_t row_bytes = layout.row() * kHalfBytes;
    keeps = tasks.are_whole && keeps_rows(product.depth, tasks.rows);
    rows = keeps ? round_up(tasks.rows, kDotRows) : kDotRows;
    // Not a power of two: blocks would share lines of a cache.
    pitch = layout.steps * kStepElements + kStepElements / 16;
    q = blocks * pitch * kHalfBytes;
    u = expand_panel_bytes(layout.rank, tasks.cols);
    p = rows * row_bytes;
    terms = expand_t_bytes(kDotRows, layout.rank, false);
    sums = blocks * kDotRows * kRowBlock * kFloatBytes;
    added = kDotRows * kRowBlock * kFloatBytes;
  }
  int64_t bytes() const { return q + u + p + terms + sums + added; }
};

int64_t dot_bytes(const FusedProduct& product, const WalkTasks& tasks) {
  return std::max(DotTMemory(product).bytes(), DotMemory(product, tasks).bytes());
}

class DotWorker {
 public:
  DotWorker(const FusedProduct& product, const WalkTasks& tasks, char* memory)
      : product_(product), layout_(product), tile_(product.tile) {
    const DotMemory sizes(product, tasks);
    const auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    q_ = reinterpret_cast<BFloat16*>(take(sizes.q));
    u_ = reinterpret_cast<BFloat16*>(take(sizes.u));
    p_ = reinterpret_cast<BFloat16*>(take(sizes.p));
    terms_ = reinterpret_cast<BFloat16*>(take(sizes.terms));
    sums_ = reinterpret_cast<float*>(take(sizes.sums));
    added_ = reinterpret_cast<float*>(take(sizes.added));
    pitch_ = sizes.pitch, keeps_rows_ = sizes.keeps;
  }

  void run(const ProductTask& task) {
    const bool is_same = task_ != nullptr && task_->cols.begin == task.cols.begin;
    if (!is_same || task_->part != task.part) {
      pack_q(product_, task, {0, layout_.steps}, pitch_, q_);
    }
    const bool has_rows = keeps_rows_ && task_ != nullptr && task_->rows.begin == task.rows.begin;
    if (!is_same) update_ = nullptr;
    task_ = &task;
    blocks_ = round_up(task.cols.end - task.cols.begin, kRowBlock) / kRowBlock;
    for (int64_t m = task.rows.begin; m < task.rows.end; m += kDotRows) {
      const int64_t count = std::min<int64_t>(kDotRows, task.rows.end - m);
      BFloat16* p = p_ + (keeps_rows_ ? (m - task.rows.begin) * layout_.row() : 0);
      Span spans[kDotRows];
      const int64_t num_spans = spans_of(product_.updates, m, count, spans);
      if (!has_rows) pack_rows(m, count, {spans, static_cast<size_t>(num_spans)}, p);
      multiply(m, count, {spans, static_cast<size_t>(num_spans)}, p);
    }
  }

 private:
  using Spans = std::span<const Span>;

  void pack_rows(int64_t m, int64_t count, Spans spans, BFloat16* to) {
    copy_rows<false>(product_, m, count, to);
    if (layout_.t_steps == 0) return;
    BFloat16* t = to + layout_.steps * count * kTileDepth;
    std::memset(t, 0, static_cast<size_t>(layout_.t_steps * count * kTileDepth * kHalfBytes));
    for (const auto& [rows, update] : spans) {
      if (update == nullptr) continue;
      const int64_t rank = update->u.rank, own = rows.end - rows.begin;
      const bool is_half = update->u.dtype == Dtype::kBFloat16;
      const int64_t depth = expand_depth(rank, is_half);
      const float* from = update->t + (rows.begin - update->rows.begin) * rank;
      pack_scaled_t(from, rank, is_half, {0, own}, update->scale, terms_);
      for (int64_t i = 0; i < own; ++i) {
        BFloat16* out = t + (rows.begin - m + i) * kTileDepth;
        for (int64_t k = 0; k < depth; k += kTileDepth, out += count * kTileDepth) {
          std::memcpy(out, terms_ + i * depth + k, kTileDepth * kHalfBytes);
        }
      }
    }
  }

  DotColumns q_of(int64_t block) const {
    return {q_ + block * pitch_, kTileElements, kStepElements};
  }

  // The columns of a block, of an update of so many elements of the depth.
  DotColumns u_of(int64_t block, int64_t depth) const {
    const int64_t padded = round_up(depth, kTileDepth);
    return {u_ + block * kRowBlock * padded, kTileRows * padded, kTileElements};
  }

  DotStore store_of(int64_t m, int64_t block) const {
    const int64_t col = task_->cols.begin + block * kRowBlock;
    const auto* bias = static_cast<const BFloat16*>(task_->part->bias);
    return {static_cast<BFloat16*>(tile_.y) + col,
            tile_.y_pitch,
            tile_.rows,
            m,
            first_halves(task_->cols.end - col),
            bias == nullptr ? nullptr : bias + col};
  }

  // U's columns of the task, packed once for consecutive blocks with this update; the depth of T U.
  int64_t pack_update(const RowUpdate& update) {
    const AdapterView& u = update.u;
    if (update_ != &update) pack_expand(part_of(u, {0, u.rank}, task_->cols), u_);
    update_ = &update;
    return u.rank * expand_terms(u.dtype == Dtype::kBFloat16);
  }

  // Where those of a block from m on are; how many.
  int64_t next_rows(int64_t m, const BFloat16** rows) const {
    const int64_t count = std::min<int64_t>(kDotRows, task_->rows.end - m);
    const auto* p = static_cast<const BFloat16*>(product_.p);
    for (int64_t i = 0; i < count; ++i) rows[i] = p + product_.p_rows[m + i] * product_.p_pitch;
    return std::max<int64_t>(count, 0);
  }

  // Rows from m on, packed.
  void multiply(int64_t m, int64_t count, Spans spans, const BFloat16* p) {
    const int64_t step = count * kTileDepth;
    DotTile tile{{p, step}, {p + layout_.steps * step, step}, {}, {}, product_.depth, 0, nullptr,
                 {}};
    const RowUpdate* update = spans[0].update;
    const bool is_one = spans.size() == 1 && (update == nullptr || tile_.mask.words == nullptr);
    if (is_one && update != nullptr) tile.t_depth = pack_update(*update);
    const BFloat16* next[kDotRows];
    const int64_t to_fetch = keeps_rows_ ? 0 : next_rows(m + kDotRows, next);
    const int64_t each = (to_fetch + blocks_ - 1) / blocks_;
    for (int64_t block = 0; block < blocks_; ++block) {
      tile.q = q_of(block), tile.u = u_of(block, tile.t_depth);
      const int64_t first = std::min(block * each, to_fetch);
      tile.fetch = {next + first, std::min(each, to_fetch - first)};
      float* sums = is_one ? nullptr : sums_ + block * kDotRows * kRowBlock;
      dots_of(count).tile(tile, store_of(m, block), sums);
    }
    if (is_one) return;
    for (const Span& span : spans) add(span, m, tile);
  }

  // The update of some rows of a block to its sums, rounded and stored: as more of the depth, or,
  // under a mask, which selects from it, by itself.
  void add(const Span& span, int64_t m, const DotTile& tile) {
    const int64_t row = span.rows.begin - m, count = span.rows.end - span.rows.begin;
    DotTile own{{tile.t.at + row * kTileDepth, tile.t.step}, {}, {}, {}, 0, 0, nullptr, {}};
    if (span.update != nullptr) own.depth = pack_update(*span.update);
    for (int64_t block = 0; block < blocks_; ++block) {
      const DotStore store = store_of(m + row, block);
      const float* sums = sums_ + (block * kDotRows + row) * kRowBlock;
      own.q = u_of(block, own.depth);
      if (tile_.mask.words == nullptr) {
        own.from = sums;
        dots_of(count).tile(own, store, nullptr);
        continue;
      }
      dots_of(count).tile(own, store, added_);
      const MaskBits mask = tile_.mask.at(m + row, task_->cols.begin + block * kRowBlock);
      for (int64_t i = 0; i < count; ++i, sums += kRowBlock) {
        const uint32_t kept = mask.words[i * mask.pitch];
        const auto part = [&](int64_t at, uint32_t bits) {
          const __m512 sum = _mm512_load_ps(sums + at);
          const __m512 more = _mm512_load_ps(added_ + i * kRowBlock + at);
          return _mm512_mask_add_ps(sum, static_cast<__mmask16>(bits), sum, more);
        };
        store.row(i, part(0, kept), part(16, kept >> 16));
      }
    }
  }

  const FusedProduct& product_;
  const DotLayout layout_;
  const TileArgs tile_;
  int64_t blocks_ = 0, pitch_;
  bool keeps_rows_;
  const ProductTask* task_ = nullptr;
  const RowUpdate* update_ = nullptr;
  BFloat16 *q_, *u_, *p_, *terms_;
  float *sums_, *added_;
};

// ---- the walk ----

// Of a deeper product 14 rows and 32 columns do not stay in the second cache together: at 8960 a
// forward took 1.03 to 1.18 of torch's product from run to run, at 12288 1.6, passes 1.05 and less.
constexpr int64_t kDotMostDepth = 8192;

// Columns of a task: of 1024 of the depth half of a second cache of 1 MiB. Fewer, of a deeper one,
// would read P so often that it takes longer than to read Q from the third. At most 8 MiB, but for 32
// columns, where rows may not depend on their number and any depth is multiplied.
//
// Beside few rows that are kept, little of Q stays in the second cache, too: at 8 rows of 4096 x 4096
// a forward took 0.73 of torch's product, with 256 columns 1.3 times it.
int64_t dot_cols(int64_t depth, int64_t rows) {
  constexpr int64_t kMost = 256, kElements = 4 << 20, kFewElements = 64 << 10;
  const int64_t elements = keeps_rows(depth, rows) ? kFewElements : kElements;
  return std::clamp(elements / depth / kRowBlock * kRowBlock, kRowBlock, kMost);
}

// From so many rows on it takes less time than torch's product and passes, which is where it begins:
// at 8 rows of 1024 x 1024 a forward took 0.92 of torch's product, passes 1.17. U is packed for each
// adapter and group of columns: with 8 rows for each of 32 adapters at 2048 x 2048 one pass took 1.17
// of torch's product, passes beside the base's walk 1.08; with 16 rows 1.06 to 1.10, both.
constexpr int64_t kDotLeastRows = 8, kDotLeastOwnRows = 16, kDotLeastCols = 64;

void dot_run(const FusedProduct& product, const WalkTasks& tasks, const WalkShare& share) {
  DotWorker worker(product, tasks, share.memory);
  for (const ProductTask* task = share.begin; task != share.end; ++task) worker.run(*task);
}
