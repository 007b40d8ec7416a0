// The layer in one pass on AMX tiles (TileWalk in cpu/fused_gemm.h): all rows of a task by its columns.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
//
//     for each outer block of the depth:  pack Q's columns in tiles; they stay in the second cache
//       for each 32 rows, inner block:    pack P's rows in tiles; they stay in the first cache
//         for each 32 columns:            2 x 2 tiles of sums, += T U as more of the depth, store
//
// While tiles multiply, the block before is rounded and the next rows of P are fetched. T of one update
// of all rows is made of the packed rows. Under dropout T U has sums of its own, which the mask selects
// from. Blocks depend on the depth alone. Vector code among tiles' products adds at least the time that
// it takes alone: packing P there made the whole 1.1 times as slow, and masks are drawn before.
#pragma once

// The memory of a thread, from its start in bytes; all multiples of 64.
struct ProductMemory {
  int64_t q, u, t, p, sums, last, factor, masked, t_sums, t_rows;

  ProductMemory(const FusedProduct& product, int64_t rows, int64_t cols) {
    const Depths depths(product.depth);
    const int64_t blocks = round_up(cols, kRowBlock) / kRowBlock;
    int64_t rank = 0;
    for (const RowUpdate& update : product.updates) rank = std::max(rank, update.u.rank);
    q = blocks * depths.pitch() * kHalfBytes;
    u = expand_panel_bytes(rank, cols);
    t = 2 * expand_t_bytes(kRowBlock, rank, false);  // a span's rows are padded from its first on
    p = depths.inner * kStepElements * kHalfBytes;
    const int64_t row_blocks = depths.is_whole() ? 1 : round_up(rows, kRowBlock) / kRowBlock;
    sums = row_blocks * blocks * kSumTiles * kFloatBytes;
    last = 4 * kSumTiles * kFloatBytes;
    const int64_t rank_pad = round_up(rank, kTileRows);
    factor = product.makes_t ? shrink_panel_bytes(rank, product.depth) : 0;
    masked = product.p_mask.words != nullptr ? p : 0;
    t_sums = product.makes_t ? row_blocks * kRowBlock * rank_pad * kFloatBytes : 0;
    t_rows = product.makes_t ? kRowBlock * rank_pad * kFloatBytes : 0;
  }
  int64_t bytes() const { return q + u + t + p + sums + last + factor + masked + t_sums + t_rows; }
};

int64_t product_bytes(const FusedProduct& product, const WalkTasks& tasks) {
  return ProductMemory(product, tasks.rows, tasks.cols).bytes();
}

class TileWorker {
 public:
  TileWorker(const FusedProduct& product, char* memory, int64_t rows, int64_t cols)
      : product_(product), depths_(product.depth), tile_(product.tile) {
    const ProductMemory sizes(product, rows, cols);
    const auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    q_ = reinterpret_cast<BFloat16*>(take(sizes.q));
    u_ = reinterpret_cast<BFloat16*>(take(sizes.u));
    t_ = reinterpret_cast<BFloat16*>(take(sizes.t));
    p_ = reinterpret_cast<BFloat16*>(take(sizes.p));
    sums_ = reinterpret_cast<float*>(take(sizes.sums));
    last_ = reinterpret_cast<float*>(take(sizes.last));
    factor_ = reinterpret_cast<BFloat16*>(take(sizes.factor));
    masked_ = reinterpret_cast<BFloat16*>(take(sizes.masked));
    t_sums_ = reinterpret_cast<float*>(take(sizes.t_sums));
    t_rows_ = reinterpret_cast<float*>(take(sizes.t_rows));
    if (product.makes_t) pack_shrink(product.updates.front().q, factor_);
  }

  void run(const ProductTask& task) {
    const bool is_same = task_ != nullptr && task_->cols.begin == task.cols.begin;
    const bool is_packed = is_same && task_->part == task.part;
    if (!is_same) packed_ = nullptr;
    task_ = &task, tile_.bias = task.part->bias;
    blocks_ = round_up(task.cols.end - task.cols.begin, kRowBlock) / kRowBlock;
    for (int64_t step = 0; step < depths_.steps; step += depths_.outer) {
      const Range outer{step, std::min(step + depths_.outer, depths_.steps)};
      if (!is_packed || !depths_.is_whole()) pack_q(product_, task, outer, depths_.pitch(), q_);
      row_pointers(task_->rows.begin, next_);
      for (int64_t m = task_->rows.begin; m < task_->rows.end; m += kRowBlock) {
        std::copy_n(next_, kRowBlock, rows_);
        row_pointers(m + kRowBlock, next_);
        multiply_rows(m, outer);
      }
    }
    rounding_.finish();
  }

 private:
  int64_t count_of(int64_t m) const { return std::min(kRowBlock, task_->rows.end - m); }

  // Those past the end are not read.
  void row_pointers(int64_t m, const BFloat16** rows) const {
    const auto* p = static_cast<const BFloat16*>(product_.p);
    for (int64_t i = 0; i < kRowBlock; ++i) {
      const int64_t row = std::min(m + i, task_->rows.end - 1);
      rows[i] = p + product_.p_rows[row] * product_.p_pitch;
    }
  }

  // T of the rows from m on; whole after the last steps. The first group of columns stores it.
  void make_t(int64_t m, int64_t count, Range steps) {
    const RowUpdate& own = product_.updates.front();
    const ShrinkPanel factor(factor_, own.q.rank, own.q.dtype == Dtype::kBFloat16);
    const int64_t first = depths_.is_whole() ? 0 : m - task_->rows.begin;
    float* sums = t_sums_ + first * factor.rank_pad;
    const BFloat16* p = p_;
    if (product_.p_mask.words != nullptr) {
      pack_p<true>(rows_, count, product_.depth, steps,
                   product_.p_mask.at(m, steps.begin * kTileDepth), masked_);
      p = masked_;
    }
    if (steps.begin == 0) std::fill_n(sums, kRowBlock * factor.rank_pad, 0.0f);
    factor.multiply({p, kTileDepth, kTileElements, kStepElements}, steps, sums);
    if (steps.end < depths_.steps) return;
    factor.store(sums, count, own.t_scale, t_rows_);
    if (task_->cols.begin == 0) std::copy_n(t_rows_, count * factor.rank, own.t + m * factor.rank);
  }

  // T of the rows from m on, and U of the task's columns.
  void pack_update(const RowUpdate& update, int64_t m, Range rows) {
    const AdapterView& u = update.u;
    const int64_t rank = u.rank;
    if (packed_ != &update) pack_expand(part_of(u, {0, rank}, task_->cols), u_);
    packed_ = &update, u_is_half_ = u.dtype == Dtype::kBFloat16;
    t_depth_ = expand_depth(rank, u_is_half_);
    // Rows before the span have no T: a block's first row is row 0.
    auto* t = t_ + (rows.begin - m) * t_depth_;
    std::fill_n(t_, (rows.begin - m) * t_depth_, BFloat16{0});
    const float* from =
        product_.makes_t ? t_rows_ : update.t + (rows.begin - update.rows.begin) * rank;
    pack_scaled_t(from, rank, u_is_half_, {0, rows.end - rows.begin}, update.scale, t);
  }

  // Sums += T U for a block of columns.
  void add_update(int64_t block) const {
    const BFloat16* u = u_ + block * kRowBlock * t_depth_;
    for (int64_t k = 0; k < t_depth_; k += kTileDepth) {
      _tile_loadd(4, t_ + k, t_depth_ * kHalfBytes);
      _tile_loadd(5, t_ + kTileRows * t_depth_ + k, t_depth_ * kHalfBytes);
      _tile_loadd(6, u + k * kTileRows, 64);
      _tile_loadd(7, u + kTileRows * t_depth_ + k * kTileRows, 64);
      multiply_tiles();
    }
  }

  // Its members are set one by one: a struct read as a vector waits for all stores before it.
  void round_next(int64_t m, Range rows, int64_t block, const float* sums, const float* added) {
    const int64_t col = task_->cols.begin + block * kRowBlock;
    rounding_.sums = sums, rounding_.added = added;
    const MaskBits mask = tile_.mask.at(m, col);
    rounding_.keep = mask.words, rounding_.keep_pitch = mask.pitch;
    rounding_.tile = &tile_, rounding_.y = static_cast<BFloat16*>(tile_.y) + col;
    rounding_.exists = first_halves(task_->cols.end - col);
    rounding_.bias =
        tile_.bias == nullptr ? nullptr : static_cast<const BFloat16*>(tile_.bias) + col;
    rounding_.first = m, rounding_.row = rows.begin - m, rounding_.end = rows.end - m;
  }

  void multiply_rows(int64_t m, Range outer) {
    const int64_t count = count_of(m), ahead = std::min<int64_t>(4, (kRowBlock - 1) / blocks_ + 1);
    const bool drop = tile_.mask.words != nullptr;
    Span spans[kRowBlock];
    for (int64_t step = outer.begin; step < outer.end; step += depths_.inner) {
      const Range inner{step, std::min(step + depths_.inner, outer.end)};
      const bool is_last = inner.end == depths_.steps;
      pack_p<false>(rows_, count, product_.depth, inner, {}, p_);
      if (product_.makes_t) make_t(m, count, inner);
      int64_t num_spans = 0;
      if (is_last) {
        num_spans = spans_of(product_.updates, m, count, spans);
        if (num_spans == 1 && spans[0].update != nullptr)
          pack_update(*spans[0].update, m, spans[0].rows);
      }
      for (int64_t block = 0; block < blocks_; ++block) {
        float* sums = own_sums(m, block);
        step > 0 ? load_sums(sums) : zero_sums();
        const bool is_next_row = inner.end == outer.end;
        const Fetch fetch{(is_next_row ? next_ : rows_) + block * ahead,
                          (is_next_row ? outer.begin : inner.end) * kTileDepth,
                          std::clamp<int64_t>(kRowBlock - block * ahead, 0, ahead)};
        multiply_steps(q_ + block * depths_.pitch() + (step - outer.begin) * kStepElements,
                       inner.end - inner.begin, fetch);
        if (num_spans != 1) {
          store_sums(sums);
          continue;
        }
        float *last = last_ + turn_ * 2 * kSumTiles, *added = nullptr;
        if (spans[0].update != nullptr && drop) {
          store_sums(last);
          zero_sums();
          added = last + kSumTiles;
        }
        if (spans[0].update != nullptr) add_update(block);
        store_sums(added == nullptr ? last : added);
        turn_ = 1 - turn_;
        round_next(m, spans[0].rows, block, last, added);
      }
      if (num_spans > 1) round_spans(m, spans, num_spans);
    }
  }

  // Rows of several adapters: each has the sums of a block that is all its own.
  void round_spans(int64_t m, const Span* spans, int64_t num_spans) {
    const bool drop = tile_.mask.words != nullptr;
    rounding_.finish();
    for (int64_t i = 0; i < num_spans; ++i) {
      const auto& [rows, update] = spans[i];
      if (update != nullptr) pack_update(*update, m, rows);
      for (int64_t block = 0; block < blocks_; ++block) {
        const float *base = own_sums(m, block), *added = nullptr;
        if (update != nullptr) {
          drop ? zero_sums() : load_sums(base);
          add_update(block);
          store_sums(last_);
          (drop ? added : base) = last_;
        }
        round_next(m, rows, block, base, added);
        rounding_.finish();
      }
    }
  }

  float* own_sums(int64_t m, int64_t block) const {
    const int64_t row_block = depths_.is_whole() ? 0 : (m - task_->rows.begin) / kRowBlock;
    return sums_ + (row_block * blocks_ + block) * kSumTiles;
  }

  // Rows to fetch beside the products, a step of the depth at a time.
  struct Fetch {
    const BFloat16* const* rows;
    int64_t depth, count;
  };

  void multiply_steps(const BFloat16* q, int64_t steps, Fetch fetch) {
    const BFloat16* p = p_;
    const int64_t rounded = (kRowBlock + steps - 1) / steps;
    for (int64_t k = 0; k < steps; ++k, p += kStepElements, q += kStepElements) {
      // P's tiles stay in the first cache; Q's pass through it.
      _tile_stream_loadd(6, q, 64);
      _tile_loadd(4, p, 64);
      _tile_loadd(5, p + kTileElements, 64);
      _tile_stream_loadd(7, q + kTileElements, 64);
      multiply_tiles();
      for (int64_t i = 0; i < rounded && !rounding_.is_done(); ++i) rounding_.one();
      for (int64_t i = 0; i < fetch.count; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(fetch.rows[i] + fetch.depth + k * kTileDepth),
                     _MM_HINT_T1);
      }
    }
    rounding_.finish();
  }

  const FusedProduct& product_;
  const ProductTask* task_ = nullptr;
  const Depths depths_;
  TileArgs tile_;
  int64_t blocks_ = 0;
  BFloat16 *q_, *u_, *t_, *p_, *factor_, *masked_;
  float *sums_, *last_, *t_sums_, *t_rows_;
  const BFloat16 *rows_[kRowBlock], *next_[kRowBlock];
  const RowUpdate* packed_ = nullptr;
  bool u_is_half_ = false;
  int64_t t_depth_ = 0, turn_ = 0;
  Rounding rounding_;
};

void run_product(const FusedProduct& product, const WalkTasks& tasks, const WalkShare& share) {
  const TileConfig config;
  TileWorker worker(product, share.memory, tasks.rows, tasks.cols);
  for (const ProductTask* task = share.begin; task != share.end; ++task) worker.run(*task);
}
