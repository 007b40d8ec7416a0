// Runs lora_grouped_gemm_sm80 with rows of many adapters: with a product of P and Q or as the
// update alone, with and without bias, base and mask. T has NaN in rows without an adapter and past
// ranks.
#include "emulated/kernels/lora_grouped_gemm.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_factors.h"

namespace kernels {
namespace {

constexpr double kUnwritten = -12345;

// kAlignment: of Y and the base.
template <Alignment kAlignment, class T, class F, class Tile, bool kMNMajor, bool kMasked>
class GroupedGemm {
  Random random_;
  const int m_, n_, depth_;
  const int k_ = random_() % 3 == 0 || kAlignment == Alignment::kElement ? 0 : depth_;
  const int max_rank_ = draw_rank();
  const GroupedRows rows_{m_, 1 + static_cast<int>(random_() % (random_() % 2 ? 6 : 2 * m_)),
                          max_rank_, random_};
  const Numbers numbers_ = random_() % 2 ? Numbers::Integers : Numbers::Reals;
  GroupedTables tables_{rows_, 64};
  const std::vector<int> order_ = GroupedTables::positions(rows_);
  GroupedFactors<F> factors_{rows_, kMNMajor ? 1 : n_, kMNMajor ? n_ : 1, numbers_, random_};
  const VectorOperand<T> p_{m_, depth_, numbers_, random_, "p"};
  const VectorOperand<T> q_{kMNMajor ? depth_ : n_, kMNMajor ? n_ : depth_, numbers_, random_, "q"};
  const Bias<T> bias_{n_, numbers_, random_};
  const Operand<T, kAlignment> base_{m_, n_, numbers_, random_, "base"};
  const RandomMask mask_{numbers_, random_};
  const int width_ = padded(rows_.max_rank);
  const WrittenRows<T> t_{m_, (kSplit ? 2 : 1) * width_ + 8, false, from_double<T>(NAN), "t"};
  const WrittenRows<T> y_{m_,    n_ + 8 - n_ % 8 * (kAlignment == Alignment::kVector),
                          false, from_double<T>(kUnwritten),
                          "y",   Layout<kAlignment>::kOffset};
  int spoiled_ = -1;  // an adapter full of NaN, which must not reach rows of others
  const bool with_bias_ = !kMasked && random_() % 2;
  const bool with_base_ = adds_onto_base<Tile, kMNMajor> && random_() % 2;

 public:
  explicit GroupedGemm(const Case& run)
      : random_(run.seed), m_(run.size.m), n_(run.size.n), depth_(run.size.k) {
    tables_.fill(rows_);
    if (random_() % 2) spoiled_ = rows_.adapter_of[random_() % static_cast<uint64_t>(m_)];
    if (spoiled_ >= 0) factors_.spoil(spoiled_);
    for (int i = 0; i < m_; ++i) {
      const int adapter = rows_.adapter_of[order_[i]];
      for (int half = 0; adapter >= 0 && half < (kSplit ? 2 : 1); ++half)
        for (int r = 0; r < rows_.rank(adapter); ++r)
          t_.data()[i * t_.pitch() + half * width_ + r] = from_double<T>(
              numbers_ == Numbers::Integers ? static_cast<double>(random_() % 5) - 2
                                            : static_cast<double>(random_() % 1000) / 500 - 1);
    }
  }

  void run() {
    LoraGroupedGemmParams<T> params{};
    LoraGemmParams<T>& gemm = params.gemm;
    if (k_ > 0) gemm.p = p_.data(), gemm.q = q_.data();
    gemm.whole_chunks = kAlignment == Alignment::kVector;
    gemm.p_pitch = p_.pitch(), gemm.q_pitch = q_.pitch();
    gemm.y = y_.data(), gemm.y_pitch = y_.pitch(), gemm.t_pitch = t_.pitch();
    gemm.m = m_, gemm.n = n_, gemm.k = k_, gemm.mask = mask_.parameters();
    gemm.bias = with_bias_ ? bias_.data(false) : nullptr;
    if (with_base_) gemm.base = base_.data(), gemm.base_pitch = base_.pitch();
    params.t = t_.data(), params.lo_column = width_;
    params.factors = factors_.pool.parameters(), params.segments = tables_.segments.data();
    params.first = tables_.first.data(), params.order = tables_.parameters().order;
    const int tiles = static_cast<int>(blocks_of(m_, Tile::kM) * blocks_of(n_, Tile::kN));
    emulator::Stream stream;
    stream.launch({.grid = dim3(1 + static_cast<unsigned>(random_() % tiles)),
                   .block = dim3(Tile::kThreads),
                   .shared_bytes = Tile::kSharedBytes},
                  lora_grouped_gemm_sm80<T, F, Tile, kMNMajor, kMasked>, params);
    run_timed(stream);
    compare_counters();
    check();
  }

 private:
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kTerms = kSplit ? 3 : 1;
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 16, 17, 40, 64, 65, 130};
    const int rank = kRanks[random_() % std::size(kRanks)];
    return kSplit && rank == 17 && m_ % 2 == 1 ? 23 : rank;  // one float less than whole chunks
  }

  // Each tile multiplies all of P Q, and for each of its adapters the blocks of 16 rows that have
  // it; it reads its rows of P, their rows of T, and its columns of Q and U once.
  void compare_counters() {
    const int64_t row_tiles = blocks_of(m_, Tile::kM);
    const int64_t column_tiles = blocks_of(n_, Tile::kN);
    int64_t blocks = row_tiles * 8 * ((k_ + 63) / 64 * 4);  // 16 x 16 of P, for each column tile
    int64_t elements = (column_tiles * m_ + row_tiles * n_) * k_;
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      const int row0 = static_cast<int>(tile) * Tile::kM, row_end = std::min(row0 + Tile::kM, m_);
      for (int i = 0; tables_.segments[i].adapter >= 0; ++i) {
        const LoraGroupedSegment& segment = tables_.segments[i];
        if (segment.begin >= row_end || segment.end <= row0) continue;
        const int first = std::max(segment.begin, row0) / 16,
                  last = (std::min(segment.end, row0 + Tile::kM) - 1) / 16;
        blocks += int64_t{kTerms} * (last - first + 1) * ((segment.rank + 15) / 16);
        const int rows = std::min(segment.end, row_end) - std::max(segment.begin, row0);
        elements += int64_t{kTerms} * column_tiles * rows * segment.rank;
        const bool whole = kMNMajor ? factors_.a_in_chunks(segment.adapter)
                                    : factors_.b_in_chunks(segment.adapter);
        if (whole) elements += int64_t{n_} * segment.rank;
      }
    }
    compare_count("operations of tensor cores", emulator::counters().mma_flop,
                  blocks * column_tiles * Tile::kN * 2 * 16 * 16);
    compare_copied_bytes(2 * elements);
  }

  void check() {
    for (int position = 0; position < m_; ++position) {
      for (int j = 0; j < y_.width(); ++j) {
        const int row = order_[position];
        if (j < n_ && spoiled_ >= 0 && rows_.adapter_of[row] == spoiled_) continue;
        compare_rounded("y", row, j, y_(row, j), expected(position, row, j),
                        numbers_ == Numbers::Integers || j >= n_);
      }
    }
  }

  Bounded expected(int position, int row, int j) const {
    Bounded sum;
    if (j >= n_) {
      sum.value = kUnwritten;
      return sum;
    }
    for (int l = 0; l < k_; ++l)
      sum.add(p_.matrix(row, l) * (kMNMajor ? q_.matrix(l, j) : q_.matrix(j, l)));
    const int adapter = rows_.adapter_of[row];
    const double factor = kMasked ? mask_.factor(row, j) : 1;
    for (int r = 0; r < rows_.rank_of_row(row); ++r) {
      const double u = kMNMajor ? factors_.a(adapter, r, j) : factors_.b(adapter, j, r);
      const double t = to_double(t_(position, r));
      const double hi = half_of<T, F>(u, false), lo = half_of<T, F>(u, true);
      sum.add(factor * t * hi);
      if (!kSplit) continue;
      sum.add(factor * t * lo);
      sum.add(factor * to_double(t_(position, width_ + r)) / kLoScale<T> * hi);
    }
    if (with_bias_) sum.add(bias_.matrix(0, j));
    if (with_base_) sum.add(base_.matrix(row, j));
    return sum;
  }
};

}  // namespace

#define RUN(name, alignment, ...) \
  {#name, [](const Case& run) { return GroupedGemm<alignment, __VA_ARGS__>(run).run(); }},
#define VARIANT(name, ...) RUN(name, Alignment::kVector, __VA_ARGS__)
#define ELEMENT_VARIANT(name, ...) RUN(name, Alignment::kElement, __VA_ARGS__)
const Program program{
    "lora_grouped_gemm",
    {LORA_GROUPED_GEMM_VARIANTS(VARIANT) LORA_GROUPED_GEMM_ELEMENT_VARIANTS(ELEMENT_VARIANT)},
    {{"even", 256, 128, 128},
     {"odd", 131, 77, 99},
     {"tall", 1024, 65, 24},
     {"wide", 70, 300, 200},
     SIZES_OF_SLABS{"tiny", 1, 1, 5}}};

}  // namespace kernels
