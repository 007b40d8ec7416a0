// Runs lora_grouped_gemm_sm80 with rows of many adapters: with a product of P and Q or as the
// update alone, with and without bias, base and mask. T has NaN in rows without an adapter and past
// ranks.
#include "emulated/kernels/lora_grouped_gemm.h"

#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_GROUPED_GEMM_INSTANCE(__VA_ARGS__);
LORA_GROUPED_GEMM_VARIANTS(EXTERN_INSTANCE)

namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;

constexpr double kUnwritten = -12345;

// kAlignment: of Y and the base.
template <Alignment kAlignment, class T, class F, class Tile, bool kMNMajor, bool kMasked>
class GroupedGemm {
 public:
  explicit GroupedGemm(const Case& run)
      : random_(run.seed),
        m_(run.size.m),
        n_(run.size.n),
        k_(random_() % 3 == 0 || kAlignment == Alignment::kElement ? 0 : run.size.k),
        rows_(m_, 1 + static_cast<int>(random_() % (random_() % 2 ? 6 : 2 * m_)), draw_rank(),
              random_),
        numbers_(random_() % 2 ? Numbers::Integers : Numbers::Reals),
        tables_(rows_, 64),
        order_(kernels::GroupedTables::positions(rows_)),
        factors_(rows_, kMNMajor ? 1 : n_, kMNMajor ? n_ : 1, numbers_, random_),
        p_(m_, run.size.k, numbers_, random_, "p"),
        q_(kMNMajor ? run.size.k : n_, kMNMajor ? n_ : run.size.k, numbers_, random_, "q"),
        bias_(kernels::random_matrix<T>(1, n_, n_, numbers_, random_)),
        bias_buffer_(bias_.values, "bias"),
        base_(m_, n_, numbers_, random_, "base"),
        mask_(numbers_, random_),
        width_(kernels::padded(rows_.most_rank)),
        t_(static_cast<size_t>(m_) * t_pitch(), "t"),
        y_(m_, n_ + 8 - n_ % 8 * (kAlignment == Alignment::kVector), false,
           kernels::from_double<T>(kUnwritten), "y", kernels::Layout<kAlignment>::kOffset) {
    tables_.fill(rows_);
    if (random_() % 2) spoiled_ = rows_.adapter_of[random_() % static_cast<uint64_t>(m_)];
    if (spoiled_ >= 0) factors_.spoil(spoiled_);
    t_.fill(kernels::from_double<T>(NAN));
    for (int i = 0; i < m_; ++i) {
      const int adapter = rows_.adapter_of[order_[i]];
      for (int half = 0; adapter >= 0 && half < (kSplit ? 2 : 1); ++half)
        for (int r = 0; r < rows_.rank(adapter); ++r)
          t_[static_cast<size_t>(i) * t_pitch() + half * width_ + r] = kernels::from_double<T>(
              numbers_ == Numbers::Integers ? static_cast<double>(random_() % 5) - 2
                                            : static_cast<double>(random_() % 1000) / 500 - 1);
    }
  }

  std::string run() {
    LoraGroupedGemmParams<T> params{};
    LoraGemmParams<T>& gemm = params.gemm;
    if (k_ > 0) gemm.p = p_.data(), gemm.q = q_.data();
    gemm.whole_chunks = kAlignment == Alignment::kVector;
    gemm.p_pitch = p_.pitch(), gemm.q_pitch = q_.pitch();
    gemm.y = y_.data(), gemm.y_pitch = y_.pitch(), gemm.t_pitch = t_pitch();
    gemm.m = m_, gemm.n = n_, gemm.k = k_, gemm.mask = mask_.parameters();
    gemm.bias = with_bias_ ? bias_buffer_.data() : nullptr;
    if (with_base_) gemm.base = base_.data(), gemm.base_pitch = base_.pitch();
    params.t = t_.data(), params.lo_column = width_;
    params.factors = factors_.parameters(), params.segments = tables_.segments.data();
    params.first = tables_.first.data(), params.order = tables_.parameters().order;
    const int tiles =
        static_cast<int>(kernels::blocks_of(m_, Tile::kM) * kernels::blocks_of(n_, Tile::kN));
    emulator::Stream stream;
    stream.launch({.grid = dim3(1 + static_cast<unsigned>(random_() % tiles)),
                   .block = dim3(Tile::kThreads),
                   .shared_bytes = Tile::kSharedBytes},
                  lora_grouped_gemm_sm80<T, F, Tile, kMNMajor, kMasked>, params);
    kernels::run_timed(stream);
    const std::string counted = compare_counters();
    return counted.empty() ? compare() : counted;
  }

 private:
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kTerms = kSplit ? 3 : 1;
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 16, 17, 40, 64, 65, 130};
    return kRanks[random_() % std::size(kRanks)];
  }
  int t_pitch() const { return (kSplit ? 2 : 1) * width_ + 8; }

  // Each tile multiplies all of P Q, and of each of its adapters the 16 rows that it is in; and
  // asks once for its rows of P, theirs of T, and its columns of Q and U.
  std::string compare_counters() {
    const int64_t row_tiles = kernels::blocks_of(m_, Tile::kM);
    const int64_t column_tiles = kernels::blocks_of(n_, Tile::kN);
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
    const emulator::Counters counted = emulator::counters();
    const int64_t flop = blocks * column_tiles * Tile::kN * 2 * 16 * 16;
    const auto copied = static_cast<int64_t>(
        counted.global_bytes[static_cast<int>(emulator::GlobalAccess::CpAsync)]);
    if (static_cast<int64_t>(counted.mma_flop) == flop && copied == 2 * elements) return "";
    return emulator::format(
        "expected %lld operations of tensor cores and %lld bytes, counted %lld and %lld",
        static_cast<long long>(flop), static_cast<long long>(2 * elements),
        static_cast<long long>(counted.mma_flop), static_cast<long long>(copied));
  }

  std::string compare() {
    for (int position = 0; position < m_; ++position) {
      for (int j = 0; j < y_.width(); ++j) {
        const int row = order_[position];
        if (j < n_ && spoiled_ >= 0 && rows_.adapter_of[row] == spoiled_) continue;
        const Bounded sum = expected(position, row, j);
        const bool exact = numbers_ == Numbers::Integers || j >= n_;
        const double rounded = kernels::to_double(kernels::from_double<T>(sum.value));
        const double error =
            sum.error() + kernels::rounding_error<T>(std::fabs(sum.value) + sum.error());
        const std::string difference = kernels::compare(
            "y", row, j, y_(row, j), exact ? rounded : sum.value, exact ? 0 : error);
        if (!difference.empty()) return difference;
      }
    }
    return "";
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
    for (int r = 0; adapter >= 0 && r < rows_.rank(adapter); ++r) {
      const double u = kMNMajor ? factors_.a(adapter, r, j) : factors_.b(adapter, j, r);
      const T* t = &t_[static_cast<size_t>(position) * t_pitch() + r];
      const double hi = kernels::half_of<T, F>(u, false), lo = kernels::half_of<T, F>(u, true);
      sum.add(factor * kernels::to_double(t[0]) * hi);
      if (!kSplit) continue;
      sum.add(factor * kernels::to_double(t[0]) * lo);
      sum.add(factor * kernels::to_double(t[width_]) / kLoScale<T> * hi);
    }
    if (with_bias_) sum.add(bias_(0, j));
    if (with_base_) sum.add(base_.matrix(row, j));
    return sum;
  }

  std::mt19937_64 random_;
  const int m_, n_, k_;
  const kernels::GroupedRows rows_;
  const Numbers numbers_;
  kernels::GroupedTables tables_;
  const std::vector<int> order_;
  kernels::GroupedFactors<F> factors_;
  const kernels::Operand<T, Alignment::kVector> p_, q_;
  const kernels::Matrix<T> bias_;
  const GlobalBuffer<T> bias_buffer_;
  const kernels::Operand<T, kAlignment> base_;
  const kernels::RandomMask mask_;
  const int width_;
  GlobalBuffer<T> t_;
  kernels::WrittenRows<T> y_;
  int spoiled_ = -1;  // an adapter full of NaN, which no other's rows may see
  const bool with_bias_ = !kMasked && random_() % 2;
  const bool with_base_ = adds_onto_base<Tile, kMNMajor> && random_() % 2;
};

#define RUN(name, alignment, ...) \
  {#name, [](const Case& run) { return GroupedGemm<alignment, __VA_ARGS__>(run).run(); }},
#define VARIANT(name, ...) RUN(name, Alignment::kVector, __VA_ARGS__)
#define ELEMENT_VARIANT(name, ...) RUN(name, Alignment::kElement, __VA_ARGS__)
const std::vector<kernels::Variant> kVariants = {
    LORA_GROUPED_GEMM_VARIANTS(VARIANT) LORA_GROUPED_GEMM_ELEMENT_VARIANTS(ELEMENT_VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_grouped_gemm",
                                {{"even", 256, 128, 128},
                                 {"odd", 131, 77, 99},
                                 {"tall", 1024, 65, 24},
                                 {"wide", 70, 300, 200},
                                 {"tiny", 1, 1, 5}},
                                lora_ext::kernel::kVariants);
}
