// A product of lora_grouped_gemm_own_weights, on mma.sync or on wgmma, with the rows of experts, of
// which some have none, and rows past the last expert's: gathered, of which a token has several,
// masked and stored by other tables, with biases, and factors in one half or two. Up to three groups,
// each with a U, share a W. W and U without rows are NaN. In some runs only a range of W is there.
#pragma once
#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_rows.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/operand.h"
#include "kernels/grouped/own_weights_sm90a.h"

namespace kernels {

inline constexpr double kUnwritten = -12345;

// The matrices of experts one below the other, with a row of NaN between them.
template <class T, Alignment kAlignment>
struct OfExperts {
  const int lines;
  const Operand<T, kAlignment> all;

  OfExperts(int experts, int lines_, int columns, Numbers numbers, Random& random, const char* name)
      : lines(lines_), all(experts * (lines + 1), columns, numbers, random, name) {
    for (int e = 0; e < experts; ++e) spoil_row(e * (lines + 1) + lines);
  }
  int64_t stride() const { return (lines + 1) * all.pitch(); }
  double operator()(int expert, int line, int column) const {
    return all.matrix(expert * (lines + 1) + line, column);
  }
  void spoil(int expert) {
    for (int line = 0; line < lines; ++line) spoil_row(expert * (lines + 1) + line);
  }
  void spoil_row(int row) {
    std::fill_n(all.stored.data() + row * all.pitch(), all.matrix.columns, from_double<T>(NAN));
  }
};

// A table that gathers rows, of `count`, or puts them in another order; or none.
struct Table {
  const bool given;
  GlobalBuffer<int> rows;

  Table(int m, int count, bool once, Random& random, const char* name)
      : given(random() % 3 != 0), rows(static_cast<size_t>(m), name) {
    for (int i = 0; i < m; ++i)
      rows[i] = once ? i : static_cast<int>(random() % static_cast<uint64_t>(count));
    if (once) std::shuffle(rows.begin(), rows.end(), random);
  }
  const int* data() const { return given ? rows.data() : nullptr; }
  int operator()(int position) const { return given ? rows[position] : position; }
};

// kAlignment: of P, Q and Y.
template <Alignment kAlignment, class T, class Tile, bool kMNMajor, bool kUMNMajor, bool kMasked>
class OwnWeightsGemm {
  static constexpr bool kWgmma = std::is_same_v<Tile, OwnWeightsTile>;
  Random random_;
  const int m_, n_, depth_;
  const int k_ = random_() % 6 == 0 ? 0 : depth_;
  const int rank_ = draw_rank(), width_ = padded(rank_), terms_ = random_() % 2 ? 3 : 1;
  const int columns_ = width_ * (terms_ == 3 ? 2 : 1);
  const int experts_ = 1 + static_cast<int>(random_() % (random_() % 2 ? 3 : 12));
  const GroupedRows rows_{m_, experts_, rank_, random_, true, true};
  const Numbers numbers_ = random_() % 2 ? Numbers::Integers : Numbers::Reals;
  const int groups_per_weight_ = 1 + static_cast<int>(random_() % 3);
  const int weights_ = weight_of(experts_ - 1) + 1;
  GroupedTables tables_{rows_, 64, groups_per_weight_};
  const Table p_rows_{m_, 1 + m_ / 2, false, random_, "rows of p"};
  const Table y_rows_{m_, m_, true, random_, "rows of y"};
  const Table mask_rows_{m_, m_, true, random_, "rows of the mask"};
  const Operand<T, kAlignment> p_{m_, depth_, numbers_, random_, "p"};
  OfExperts<T, kAlignment> q_{
      weights_, kMNMajor ? depth_ : n_, kMNMajor ? n_ : depth_, numbers_, random_, "q"};
  OfExperts<T, Alignment::kVector> u_{
      experts_, kUMNMajor ? columns_ : n_, kUMNMajor ? n_ : columns_, numbers_, random_, "u"};
  const Bias<T> bias_{weights_ * (n_ + 1), numbers_, random_};
  const RandomMask mask_{numbers_, random_};
  const WrittenRows<T> t_{m_, columns_ + 8, false, from_double<T>(NAN), "t"};
  const WrittenRows<T> y_{m_,    n_ + 8 - n_ % 8 * (kAlignment == Alignment::kVector),
                          false, from_double<T>(kUnwritten),
                          "y",   Layout<kAlignment>::kOffset};
  const bool with_bias_ = !kMasked && random_() % 2, float_bias_ = random_() % 2;
  int spoiled_ = -1;                // an expert whose U is NaN, which must not reach rows of others
  int first_ = 0, end_ = weights_;  // the experts that have a W

 public:
  explicit OwnWeightsGemm(const Case& run)
      : random_(run.seed),
        m_(run.size.m),
        n_(kWgmma ? padded(run.size.n) : run.size.n),
        depth_(kWgmma && kMNMajor ? std::max(64, padded(run.size.k)) : run.size.k) {
    tables_.fill(rows_);
    if (run.seed % 3 == 0) {
      first_ = static_cast<int>(run.seed / 3) % weights_;
      end_ = first_ + 1 + static_cast<int>(run.seed / 3) % (weights_ - first_);
    }
    if (random_() % 2) spoiled_ = rows_.adapter_of[random_() % static_cast<uint64_t>(m_)];
    const std::vector<int>& taken = rows_.adapter_of;
    for (int e = 0; e < experts_; ++e)
      if (e == spoiled_ || std::find(taken.begin(), taken.end(), e) == taken.end()) u_.spoil(e);
    for (int w = 0; w < weights_; ++w) {
      const auto has_it = [&](int e) { return e >= 0 && weight_of(e) == w; };
      if (!is_here(w) || std::none_of(taken.begin(), taken.end(), has_it)) q_.spoil(w);
    }
    for (int i = 0; i < m_; ++i)
      for (int half = 0; taken[i] >= 0 && half < columns_ / width_; ++half)
        for (int r = 0; r < rank_; ++r)
          t_.data()[i * t_.pitch() + half * width_ + r] = from_double<T>(
              numbers_ == Numbers::Integers ? static_cast<double>(random_() % 5) - 2
                                            : static_cast<double>(random_() % 1000) / 500 - 1);
  }

  void run() {
    LoraOwnWeightsParams<T> params{};
    LoraGemmParams<T>& gemm = params.gemm;
    if (k_ > 0) gemm.p = p_.data(), gemm.q = q_.all.data() + first_ * q_.stride();
    params.first_expert = first_, params.end_expert = end_;
    gemm.p_pitch = p_.pitch(), gemm.q_pitch = q_.all.pitch(), params.q_stride = q_.stride();
    params.q_rows = q_.lines + 1;
    gemm.low_rank[0] = {t_.data(), u_.all.data()};
    gemm.t_pitch = t_.pitch(), gemm.u_pitch = u_.all.pitch(), params.u_stride = u_.stride();
    gemm.y = y_.data(), gemm.y_pitch = y_.pitch(), gemm.mask = mask_.parameters();
    if (with_bias_) gemm.bias = bias_.data(float_bias_);
    gemm.float_bias = float_bias_, params.bias_stride = n_ + 1;
    gemm.whole_chunks = kAlignment == Alignment::kVector;
    gemm.m = m_, gemm.n = n_, gemm.k = k_, gemm.rank = rank_, gemm.terms = terms_;
    params.width = width_;
    params.row_tiles = tables_.row_tiles.data();
    params.row_tile_count = static_cast<int>(tables_.row_tiles.size());
    const auto is_empty = [&] { return tables_.row_tiles[params.row_tile_count - 1].count == 0; };
    const bool has_no_empty = kWgmma && random_() % 2;  // the last tile has rows
    while (has_no_empty && is_empty()) --params.row_tile_count;
    params.p_rows = p_rows_.data(), params.y_rows = y_rows_.data();
    params.mask_rows = mask_rows_.data();
    const auto tiles = tables_.row_tiles.size() * blocks_of(n_, Tile::kN);
    const unsigned blocks = 1 + static_cast<unsigned>(random_() % tiles);
    emulator::Stream stream;
    if constexpr (kWgmma) {
      Launch launch{stream, static_cast<int64_t>(tiles)};
      launch_own_weights_sm90a(params, kMNMajor, kUMNMajor, kMasked, static_cast<int>(blocks),
                               launch);
    } else {
      stream.launch(
          {.grid = dim3(blocks), .block = dim3(Tile::kThreads), .shared_bytes = Tile::kSharedBytes},
          lora_grouped_gemm_own_weights_sm80<T, Tile, kMNMajor, kUMNMajor, kMasked>, params);
    }
    run_timed(stream);
    compare_counters();
    check();
  }

 private:
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 12, 16, 17, 40, 64, 130};
    return kRanks[random_() % std::size(kRanks)];
  }

  int weight_of(int group) const { return group / groups_per_weight_; }
  bool is_here(int weight) const { return weight >= first_ && weight < end_; }
  // Rows of no expert are with the first's.
  bool has_weight(int group) const { return is_here(weight_of(std::max(group, 0))); }

  // Each tile of an expert multiplies all of P Q and of T U, and reads its rows of P and T and its
  // columns of Q and U once. Rows without an expert, empty tiles and others' read nothing.
  void compare_counters() {
    const int64_t column_tiles = blocks_of(n_, Tile::kN);
    const int64_t all_ranks = hi_from() + rank_, last = (all_ranks - 1) % 64 / 16 + 1;
    const int64_t of_base = kAlignment == Alignment::kVector ? k_ : 0;
    int64_t tiles = 0, elements = 0, of_maps = 0;
    for (const LoraGroupedPiece& piece : tables_.row_tiles) {
      if (piece.adapter < 0 || piece.count == 0 || !has_weight(piece.adapter)) continue;
      ++tiles;
      const int64_t of_q = kWgmma ? 0 : of_base, of_t = int64_t{terms_} * rank_;
      elements += column_tiles * piece.count * (of_base + of_t) + n_ * (of_q + of_t);
      of_maps += elements_of_q(weight_of(piece.adapter));
    }
    const int64_t k16 =
        (k_ + 63) / 64 * 4 + (all_ranks - 1) / 64 * 4 + (kWgmma && last > 1 ? 4 : last);
    const emulator::Counters& counters = emulator::counters();
    compare_count("operations of tensor cores", kWgmma ? counters.wgmma_flop : counters.mma_flop,
                  tiles * column_tiles * Tile::kM * Tile::kN * 2 * 16 * k16);
    compare_copied_bytes(2 * elements);
    if (!kWgmma) return;
    compare_count("bytes loaded", counted_bytes(emulator::GlobalAccess::TmaLoad), 2 * of_maps);
    compare_count("bank conflicts", counters.matrix_conflicts, 0);
  }
  // The depth before the term of hi hi.
  int hi_from() const {
    const int before = terms_ == 3 ? 2 * width_ : 0;
    return kWgmma && std::is_same_v<T, __half> ? (before + 63) / 64 * 64 : before;
  }
  // Of the experts' matrices one below the other, what the boxes of all tiles with some rows have.
  int64_t elements_of_q(int expert) const {
    if (kMNMajor) return int64_t{(k_ + 63) / 64 * 64} * n_;
    int64_t rows = 0;
    for (int column = 0; column < n_; column += Tile::kN)
      rows += std::min(256, (end_ - 1 - expert) * (n_ + 1) + n_ - column);
    return rows * k_;
  }

  void check() {
    for (int position = 0; position < m_; ++position) {
      const int expert = rows_.adapter_of[position], row = y_rows_(position);
      for (int j = 0; j < y_.width(); ++j) {
        if (j < n_ && spoiled_ >= 0 && expert == spoiled_) continue;
        compare_rounded("y", row, j, y_(row, j), expected(position, expert, j),
                        numbers_ == Numbers::Integers || j >= n_ || !has_weight(expert));
      }
    }
  }

  Bounded expected(int position, int expert, int j) const {
    Bounded sum;
    const bool written = j < n_ && has_weight(expert);
    if (!written) sum.value = kUnwritten;
    if (!written || expert < 0) return sum;
    const int w = weight_of(expert);
    for (int l = 0; l < k_; ++l)
      sum.add(p_.matrix(p_rows_(position), l) * (kMNMajor ? q_(w, l, j) : q_(w, j, l)));
    const double factor = kMasked ? mask_.factor(mask_rows_(position), j) : 1;
    const auto add = [&](int of_t, int of_u, double scale) {
      const double u = kUMNMajor ? u_(expert, of_u, j) : u_(expert, j, of_u);
      sum.add(factor * to_double(t_(position, of_t)) * u * scale);
    };
    for (int r = 0; r < rank_; ++r) {
      add(r, r, 1);
      if (terms_ == 3) add(width_ + r, r, 1.0 / kLoScale<T>), add(r, width_ + r, 1.0 / kLoScale<T>);
    }
    if (with_bias_) sum.add(bias_.matrix(0, w * (n_ + 1) + j));
    return sum;
  }
};

}  // namespace kernels
