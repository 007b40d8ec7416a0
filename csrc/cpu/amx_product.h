// The layer in one pass on AMX tiles (TileWalk in cpu/fused_gemm.h): all rows of a task by its columns.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
//
//     for each outer block of the depth:  pack Q's columns in tiles; they stay in the second cache
//       for each 32 rows, inner block:    pack P's rows in tiles; they stay in the first cache
//         for each 32 columns:            2 x 2 tiles of sums, += T U as more of the depth, store
//
// A block is rounded, and the next rows of P are fetched, among the next block's products. Under
// dropout T U has sums of its own, which the mask selects from. Blocks depend on the depth alone.
#pragma once

constexpr int64_t kStepElements = 2 * kTileElements;  // 32 rows or columns, 32 of the depth
constexpr int64_t kSumTiles = 4 * kTileRows * kTileRows;
// A depth of up to 1536 is one block: Q is packed once, and no sums are kept for the next.
constexpr int64_t kWholeSteps = 48, kMostSteps = 40, kInnerSteps = 20, kMostBlocks = 18;
constexpr int64_t kMostOwnT = 3;  // tiles of T for each row and step of the depth

// In steps of 32.
struct Depths {
  int64_t steps, outer, inner;

  explicit Depths(int64_t depth) : steps(round_up(depth, kTileDepth) / kTileDepth) {
    const auto even = [](int64_t all, int64_t most) {
      const int64_t parts = (all + most - 1) / most;
      return (all + parts - 1) / parts;
    };
    outer = steps <= kWholeSteps ? steps : even(steps, kMostSteps);
    inner = even(outer, kInnerSteps);
  }
  bool is_whole() const { return outer >= steps; }
  // The pitch of a packed block of columns. Not a power of two: blocks would share lines of a cache.
  int64_t pitch() const { return outer * kStepElements + kStepElements / 16; }
};

int64_t product_cols(int64_t depth) {
  return std::min<int64_t>(kMostBlocks, 576 / Depths(depth).outer) * kRowBlock;
}

// Rows of a block that are still to be rounded and stored.
struct Rounding {
  const float *sums = nullptr, *added = nullptr;  // the second: under dropout
  const uint32_t* keep = nullptr;
  int64_t keep_pitch = 0;
  const TileArgs* tile = nullptr;
  BFloat16* y = nullptr;  // row 0 of the layer, at the block's first column
  __mmask32 exists = 0;
  const BFloat16* bias = nullptr;
  int64_t first = 0, row = 0, end = 0;

  bool is_done() const { return row >= end; }
  void one() {
    const float* sum = sums + row * kTileRows;
    __m512 low = _mm512_load_ps(sum), high = _mm512_load_ps(sum + kSumTiles / 2);
    if (bias != nullptr) {
      const __m512i value = _mm512_maskz_loadu_epi16(exists, bias);
      low = _mm512_add_ps(low, to_wide(_mm512_castsi512_si256(value)));
      high = _mm512_add_ps(high, to_wide(_mm512_extracti64x4_epi64(value, 1)));
    }
    if (added != nullptr) {
      const uint32_t kept = keep[row * keep_pitch];
      const float* more = added + row * kTileRows;
      low = _mm512_mask_add_ps(low, static_cast<__mmask16>(kept), low, _mm512_load_ps(more));
      high = _mm512_mask_add_ps(high, static_cast<__mmask16>(kept >> 16), high,
                                _mm512_load_ps(more + kSumTiles / 2));
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    __m512i bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    BFloat16* to = y + tile->rows[first + row++] * tile->y_pitch;
    if (exists == 0xFFFFFFFFu) {
      _mm512_storeu_si512(to, bits);
    } else {
      _mm512_mask_storeu_epi16(to, exists, bits);
    }
  }
  void finish() {
    while (!is_done()) one();
  }
};

// For each group of columns T is made anew: a tile of its ranks takes two of four products for each
// 32 columns, with two terms twice that. A pass of its own reads P once more.
bool makes_t(int64_t cols, const AdapterView& q) {
  const int64_t most = product_cols(q.cols), terms = q.dtype == Dtype::kBFloat16 ? 1 : 2;
  const int64_t groups = (cols + most - 1) / most;
  return groups * terms * round_up(q.rank, kTileRows) <= kMostOwnT * kTileRows;
}

inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kSumTiles / 4, 64);
  _tile_loadd(2, sums + kSumTiles / 2, 64);
  _tile_loadd(3, sums + kSumTiles / 4 * 3, 64);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSumTiles / 4, 64);
  _tile_stored(2, sums + kSumTiles / 2, 64);
  _tile_stored(3, sums + kSumTiles / 4 * 3, 64);
}

inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

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
    const OwnT* own = product.own_t;
    const int64_t rank_pad = round_up(rank, kTileRows);
    factor = own == nullptr ? 0 : shrink_panel_bytes(rank, product.depth);
    masked = own == nullptr || !own->dropout.enabled() ? 0 : p;
    t_sums = own == nullptr ? 0 : row_blocks * kRowBlock * rank_pad * kFloatBytes;
    t_rows = own == nullptr ? 0 : kRowBlock * rank_pad * kFloatBytes;
  }
  int64_t bytes() const {
    return q + u + t + p + sums + last + factor + masked + t_sums + t_rows;
  }
};

int64_t product_bytes(const FusedProduct& product, int64_t rows, int64_t cols) {
  return ProductMemory(product, rows, cols).bytes();
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
    if (product.own_t != nullptr) pack_shrink(product.own_t->q, factor_);
  }

  void run(const ProductTask& task) {
    const bool is_same = task_ != nullptr && task_->cols.begin == task.cols.begin;
    const bool is_packed = is_same && task_->part == task.part;
    if (!is_same) packed_ = nullptr;
    task_ = &task, tile_.bias = task.part->bias, drawn_ = {-1, -1};
    blocks_ = round_up(task.cols.end - task.cols.begin, kRowBlock) / kRowBlock;
    for (int64_t step = 0; step < depths_.steps; step += depths_.outer) {
      const Range outer{step, std::min(step + depths_.outer, depths_.steps)};
      if (!is_packed || !depths_.is_whole()) pack_q(outer);
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
  struct Span {
    Range rows;
    const RowUpdate* update;
  };

  int64_t count_of(int64_t m) const { return std::min(kRowBlock, task_->rows.end - m); }

  // Those past the end are not read.
  void row_pointers(int64_t m, const BFloat16** rows) const {
    const auto* p = static_cast<const BFloat16*>(product_.p);
    for (int64_t i = 0; i < kRowBlock; ++i) {
      const int64_t row = std::min(m + i, task_->rows.end - 1);
      rows[i] = p + product_.p_rows[row] * product_.p_pitch;
    }
  }

  // Masked: keeps, of the rows and steps, what has a bit set.
  template <bool kIsMasked>
  void pack_p(BFloat16* to, int64_t count, Range steps, MaskBits keep) const {
    constexpr int64_t kAtOnce = 4;
    for (int64_t first = steps.begin; first < steps.end; first += kAtOnce) {
      const int64_t end = std::min(first + kAtOnce, steps.end);
      for (int64_t i = 0; i < kRowBlock; ++i) {
        for (int64_t k = first; k < end; ++k) {
          const int64_t left = i < count ? product_.depth - k * kTileDepth : 0;
          __mmask32 exists = first_halves(left);
          if (kIsMasked) exists &= keep.words[i * keep.pitch + k - steps.begin];
          _mm512_store_si512(to + (k - steps.begin) * kStepElements + i * kTileDepth,
                             _mm512_maskz_loadu_epi16(exists, rows_[i] + k * kTileDepth));
        }
      }
    }
  }

  bool masks_p() const { return product_.own_t != nullptr && product_.own_t->dropout.enabled(); }
  bool masks_y() const { return tile_.dropout.enabled() && !product_.updates.empty(); }

  // Starts to draw the mask of T or of Y for the rows from m on; that of T is of so many steps.
  void draw(int64_t m, Range steps) {
    const Range rows{m, m + count_of(m)};
    if (masks_p()) {
      turn_of_kept_ = 1 - turn_of_kept_;
      kept_ = {kept_words_[turn_of_kept_], kInnerSteps};
      drawing_.start(product_.own_t->dropout, {}, rows,
                     {steps.begin * kTileDepth, steps.end * kTileDepth}, kept_);
    } else {
      drawing_.start(tile_.dropout, tile_.rows, rows, task_->cols,
                     tile_.mask.at(m, task_->cols.begin));
    }
    drawn_ = {m, steps.begin};
  }

  // What the next rows or steps need, among the products of these.
  void draw_next(int64_t m, Range steps, Range outer) {
    const bool is_same_rows = masks_p() && steps.end < outer.end;
    if (!is_same_rows) m += kRowBlock;
    if (m >= task_->rows.end) return;
    const int64_t first = is_same_rows ? steps.end : masks_p() ? outer.begin : steps.begin;
    draw(m, {first, std::min(first + depths_.inner, outer.end)});
    const int64_t products = blocks_ * (steps.end - steps.begin);
    drawn_each_ = (drawing_.left() + products - 1) / products;
  }

  // T of the rows from m on; whole after the last steps. The first group of columns stores it.
  void make_t(int64_t m, int64_t count, Range steps) {
    const OwnT& own = *product_.own_t;
    const ShrinkPanel factor(factor_, own.q.rank, own.q.dtype == Dtype::kBFloat16);
    const int64_t first = depths_.is_whole() ? 0 : m - task_->rows.begin;
    float* sums = t_sums_ + first * factor.rank_pad;
    const BFloat16* p = p_;
    if (own.dropout.enabled()) {
      pack_p<true>(masked_, count, steps, kept_);
      p = masked_;
    }
    if (steps.begin == 0) std::fill_n(sums, kRowBlock * factor.rank_pad, 0.0f);
    factor.multiply({p, kTileDepth, kTileElements, kStepElements}, steps, sums);
    if (steps.end < depths_.steps) return;
    const int64_t rank = own.q.rank;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < rank; ++j) {
        t_rows_[i * rank + j] = own.scale * sums[i * factor.rank_pad + j];
      }
    }
    if (task_->cols.begin == 0) std::copy_n(t_rows_, count * rank, own.t + m * rank);
  }

  void pack_q(Range outer) const {
    const MatrixView& q = product_.q;
    const auto* in = static_cast<const BFloat16*>(task_->part->q) + task_->cols.begin * q.col_pitch;
    const int64_t cols = task_->cols.end - task_->cols.begin;
    const auto tiles_at = [&](int64_t block, int64_t step) {
      return q_ + block * depths_.pitch() + (step - outer.begin) * kStepElements;
    };
    if (q.depth_pitch == 1) {
      for (int64_t c = 0; c < blocks_ * kRowBlock; c += kTileRows) {
        for (int64_t k = outer.begin; k < outer.end; ++k) {
          const __mmask32 exists = first_halves(product_.depth - k * kTileDepth);
          const BFloat16* at = in + c * q.col_pitch + k * kTileDepth;
          __m512i rows[kTileRows];
          for (int64_t i = 0; i < kTileRows; ++i) {
            rows[i] = _mm512_maskz_loadu_epi16(c + i < cols ? exists : 0u, at + i * q.col_pitch);
          }
          transpose_pairs(rows, tiles_at(c / kRowBlock, k) + c % kRowBlock * kTileDepth);
        }
      }
      return;
    }
    alignas(64) BFloat16 gathered[kRowBlock];
    const auto row_at = [&](int64_t d, int64_t c) {
      const __mmask32 exists = d < product_.depth ? first_halves(cols - c) : 0u;
      const BFloat16* at = in + d * q.depth_pitch + c * q.col_pitch;
      if (q.col_pitch == 1) {
        __builtin_prefetch(at + 16 * q.depth_pitch);
        return _mm512_maskz_loadu_epi16(exists, at);
      }
      for (int64_t i = 0; i < kRowBlock; ++i) {
        if ((exists >> i & 1u) != 0) gathered[i] = at[i * q.col_pitch];
      }
      return _mm512_maskz_loadu_epi16(exists, gathered);
    };
    for (int64_t d = outer.begin * kTileDepth; d < outer.end * kTileDepth; d += 2) {
      for (int64_t block = 0; block < blocks_; ++block) {
        const __m512i even = row_at(d, block * kRowBlock), odd = row_at(d + 1, block * kRowBlock);
        BFloat16* out = tiles_at(block, d / kTileDepth) + d % kTileDepth * kTileRows;
        _mm512_store_si512(out,
                           interleave(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
        _mm512_store_si512(out + kTileElements, interleave(_mm512_extracti64x4_epi64(even, 1),
                                                           _mm512_extracti64x4_epi64(odd, 1)));
      }
    }
  }

  // Consecutive rows from m on with one update or none; how many spans.
  int64_t spans_of(int64_t m, int64_t count, Span* spans) const {
    auto update = std::partition_point(product_.updates.begin(), product_.updates.end(),
                                       [&](const RowUpdate& each) { return each.rows.end <= m; });
    int64_t found = 0;
    for (int64_t row = m; row < m + count;) {
      const bool is_any = update != product_.updates.end() && update->rows.begin < m + count;
      if (is_any && update->rows.begin <= row) {
        const int64_t end = std::min(update->rows.end, m + count);
        spans[found++] = {{row, end}, &*update++};
        row = end;
      } else {
        const int64_t end = is_any ? update->rows.begin : m + count;
        spans[found++] = {{row, end}, nullptr};
        row = end;
      }
    }
    return found;
  }

  // T of the rows from m on, and U of the task's columns.
  void pack_update(const RowUpdate& update, int64_t m, Range rows) {
    AdapterView u = update.u;
    const int64_t rank = u.rank, first = task_->cols.begin * u.col_pitch;
    u.data = static_cast<const char*>(u.data) + first * element_size(u.dtype);
    u.cols = task_->cols.end - task_->cols.begin;
    if (packed_ != &update) pack_expand(u, u_);
    packed_ = &update, u_is_half_ = u.dtype == Dtype::kBFloat16;
    t_depth_ = expand_depth(rank, u_is_half_);
    // Rows before the span have no T: a block's first row is row 0.
    auto* t = t_ + (rows.begin - m) * t_depth_;
    std::fill_n(t_, (rows.begin - m) * t_depth_, BFloat16{0});
    const float* from = product_.own_t == nullptr
                            ? update.t + (rows.begin - update.rows.begin) * rank
                            : t_rows_;
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
    const bool drop = tile_.dropout.enabled();
    Span spans[kRowBlock];
    for (int64_t step = outer.begin; step < outer.end; step += depths_.inner) {
      const Range inner{step, std::min(step + depths_.inner, outer.end)};
      const bool is_last = inner.end == depths_.steps;
      const bool is_drawn = masks_p() || (is_last && masks_y());
      if (is_drawn) {
        if (drawn_ != std::pair(m, step)) draw(m, inner);
        drawing_.finish();
      }
      pack_p<false>(p_, count, inner, {});
      if (product_.own_t != nullptr) make_t(m, count, inner);
      if (is_drawn) draw_next(m, inner, outer);
      int64_t num_spans = 0;
      if (is_last) {
        num_spans = spans_of(m, count, spans);
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
    const bool drop = tile_.dropout.enabled();
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
      for (int64_t i = 0; i < drawn_each_ && !drawing_.is_done(); ++i) drawing_.one();
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
  Drawing drawing_;
  std::pair<int64_t, int64_t> drawn_{-1, -1};  // the rows and first step of the last mask
  int64_t drawn_each_ = 0, turn_of_kept_ = 0;  // so many pieces for each step of a product
  uint32_t kept_words_[2][kRowBlock * kInnerSteps];
  MaskBits kept_;
};

void run_product(const FusedProduct& product, const ProductTask* begin, const ProductTask* end,
                 char* memory, int64_t rows, int64_t cols) {
  const TileConfig config;
  TileWorker worker(product, memory, rows, cols);
  for (; begin != end; ++begin) worker.run(*begin);
}
