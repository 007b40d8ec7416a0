// Runs lora_decode with one adapter for all rows, or with each row's own: ranks that differ, rows
// without an adapter, factors in a pool or a list, aligned or not, NaN in one of them; on grids of
// any size, or as planned for some card, in a workspace of just the planned size; twice, the second
// time bit for bit as the first.
#include "emulated/kernels/lora_decode.h"

#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/variants.h"
#include "emulator/counts/counters.h"
#include "emulator/emulator.h"
#include "kernel/lora_decode_launch.h"
#include "kernel/lora_decode_params.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_DECODE_INSTANCE(__VA_ARGS__);
LORA_DECODE_VARIANTS(EXTERN_INSTANCE)

namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;

constexpr double kUnwritten = -12345;

template <class T>
double rounded_to(double value) {
  return kernels::to_double(kernels::from_double<T>(value));
}

// As csrc/cuda/ launches it, on a stream of the layer.
struct Launch {
  emulator::Stream& stream;

  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params) const {
    stream.launch({.grid = grid, .block = dim3(threads), .shared_bytes = shared_bytes}, kernel,
                  params);
  }
  void clear(uint32_t* flags, int64_t count) const {
    stream.launch({.grid = dim3(1), .block = dim3(1)}, kernels::clear_counts, flags, count);
  }
};

// Of the rows of a call, all of one adapter.
kernels::GroupedRows rows_of_one(int m, int rank, std::mt19937_64& random) {
  kernels::GroupedRows rows(m, 1, rank, random);
  rows.ranks.assign(1, rank), rows.adapter_of.assign(static_cast<size_t>(m), 0);
  return rows;
}
// Each with its own, or none: an index.
kernels::GroupedRows rows_of_many(int m, int rank, std::mt19937_64& random) {
  const int most = random() % 2 ? 3 : 2 * m;
  const int groups = 1 + static_cast<int>(random() % static_cast<uint64_t>(most));
  while (true) {
    kernels::GroupedRows rows(m, groups, rank, random);
    if (!rows.indexed) continue;
    // The last row is the first of its adapter, if there is one left.
    for (int g = 0; groups % 2 == 0 && g < groups; ++g) {
      const bool taken = std::count(rows.adapter_of.begin(), rows.adapter_of.end(), g) > 0;
      if (!taken && rows.rank(g) > 0) (*rows.buffer)[m - 1] = rows.adapter_of[m - 1] = g;
    }
    if (random() % 8 == 0) {  // nobody has an adapter
      std::fill(rows.buffer->begin(), rows.buffer->end(), -1);
      std::fill(rows.adapter_of.begin(), rows.adapter_of.end(), -1);
    }
    return rows;
  }
}

template <class T, class F, int kBatch>
class Decode {
  using Tile = LoraDecodeTile<kBatch>;

 public:
  explicit Decode(const Case& run)
      : random_(run.seed),
        m_(rows_drawn(run.size.m)),
        n_(run.size.n),
        k_(run.size.k),
        many_(random_() % 2),
        rows_(many_ ? rows_of_many(m_, draw_rank(), random_)
                    : rows_of_one(m_, draw_rank(), random_)),
        numbers_(random_() % 2 ? Numbers::Integers : Numbers::Reals),
        factors_(rows_, n_, k_, numbers_, random_, kSplit ? 0.02 : 1),
        x_(m_, k_, numbers_, random_, "x", false),
        w_(n_, k_, numbers_, random_, "w", false),
        float_bias_(random_() % 2),
        bias_(kernels::random_matrix<T>(1, n_, n_, numbers_, random_)),
        bias_buffer_(bias_.values, "bias"),
        bias_floats_(as_floats(bias_), "bias in floats"),
        scalings_(draw_scalings(), "scalings"),
        y_(m_, n_ + 3, false, kernels::from_double<T>(kUnwritten), "y"),
        s_(m_, rows_.most_rank, false, kUnwritten, "s"),
        width_((rows_.most_rank + 15) / 16 * 16) {
    if (many_ && random_() % 2) spoiled_ = rows_.adapter_of[random_() % static_cast<uint64_t>(m_)];
    if (spoiled_ >= 0) factors_.spoil(spoiled_);
    // The planner has the instance for so many rows of X, and none for too many of A.
    const int adapters = std::min(rows_.groups, m_), kMostRows = 4096;
    by_plan_ = random_() % 2 && plan::decode_tile_for(m_).batch == kBatch &&
               adapters * width_ * (kSplit ? 2 : 1) <= kMostRows;
    by_plan_ ? make_plan() : lay_out();
  }

  std::string run() {
    emulator::Stream stream;
    Launch launcher{stream};
    if (by_plan_ && !plan_.is_decode()) return "the plan is another: " + plan_.describe();
    const LoraDecodeParams<T> params = by_plan_ ? planned() : parameters();
    const auto launch = [&] {
      if (by_plan_) {
        launch_lora_decode<T, F>(plan_, params, !own_counts_, launcher);
        return kernels::run_timed(stream);
      }
      stream.launch({.grid = dim3(static_cast<unsigned>(blocks_)),
                     .block = dim3(Tile::kThreads),
                     .shared_bytes = Tile::kSharedBytes},
                    lora_decode_sm80<T, F, kBatch>, params);
      kernels::run_timed(stream);
    };
    launch();
    std::string difference = compare_counters();
    if (difference.empty()) difference = compare();
    if (difference.empty() && random_() % 3 == 0) {
      const auto first = written();
      launch();
      if (written() != first) return "a second launch has other bits";
    }
    return difference;
  }

 private:
  static constexpr bool kSplit = std::is_same_v<F, float>;
  int rows_drawn(int most) {
    const int whole = std::min(most, kBatch);
    return random_() % 3 == 0 ? whole
                              : 1 + static_cast<int>(random_() % static_cast<uint64_t>(whole));
  }
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 13, 16, 17, 40, 64, 70};
    return kRanks[random_() % std::size(kRanks)];
  }
  static std::vector<float> as_floats(const kernels::Matrix<T>& matrix) {
    std::vector<float> floats;
    for (const T& value : matrix.values)
      floats.push_back(static_cast<float>(kernels::to_double(value)));
    return floats;
  }
  std::vector<float> draw_scalings() {
    std::vector<float> scalings;
    for (int g = 0; g < rows_.groups; ++g)
      scalings.push_back(numbers_ == Numbers::Integers
                             ? static_cast<float>(random_() % 2 + 1) / 2
                             : static_cast<float>(random_() % 100) / 50.f);
    return scalings;
  }

  int steps() const { return (k_ + 63) / 64; }
  int tiles() const { return (n_ + Tile::kRows - 1) / Tile::kRows; }
  int row_blocks() const {
    std::vector<bool> taken(static_cast<size_t>(rows_.groups));
    int count = 0;
    for (const int adapter : rows_.adapter_of) {
      if (adapter < 0 || taken[static_cast<size_t>(adapter)]) continue;
      taken[static_cast<size_t>(adapter)] = true;
      count += (rows_.rank(adapter) + 15) / 16 * (kSplit ? 2 : 1);
    }
    return count;
  }
  // Of those that rows take, which may be fewer than the plan has room for.
  int s_tiles() const { return (row_blocks() * 16 + Tile::kRows - 1) / Tile::kRows; }

  // Grids of one block, of as many as there may be, and of any in between.
  void lay_out() {
    const int most = std::max(1, tiles() * steps() / plan::DecodeShares::kLeastUnits);
    const int any = 1 + static_cast<int>(random_() % static_cast<uint64_t>(most));
    blocks_ = std::min(random_() % 4 == 0 ? most : any, 40);
    const plan::DecodeShares shares{tiles(), s_tiles(), steps(), blocks_};
    const auto buffer = [](int64_t count, const char* name) {
      return std::make_unique<GlobalBuffer<float>>(static_cast<size_t>(count), name);
    };
    sums_ = buffer(int64_t{shares.slots()} * Tile::kElements, "sums");
    s_sums_ = buffer(int64_t{shares.s_slots()} * Tile::kElements, "sums of S");
    t_ = std::make_unique<GlobalBuffer<T>>(static_cast<size_t>(m_) * t_pitch(), "t");
    flags_ = std::make_unique<GlobalBuffer<uint32_t>>(static_cast<size_t>(tiles() + s_tiles() + 1),
                                                      "flags");
    flags_->fill(0);
  }
  int t_pitch() const { return (kSplit ? 2 : 1) * width_; }

  void make_plan() {
    const plan::Card cards[] = {kernels::ampere(kernels::kManySms),
                                kernels::ampere(kernels::kFewSms), kernels::small_ampere(),
                                kernels::hopper(4)};
    const plan::Card& card = cards[random_() % std::size(cards)];
    plan::Problem one{.m = m_, .n = n_, .k = k_, .rank = rows_.most_rank};
    one.float_adapters = kSplit;
    const plan::Request request{plan::Choice::kKernel};
    plan_ = many_ ? plan::grouped_forward(card, {one, rows_.groups, true}, request).one
                  : plan::forward(card, one, request);
    workspace_ = std::make_unique<GlobalBuffer<unsigned char>>(static_cast<size_t>(plan_.workspace),
                                                               "workspace");
    own_counts_ = random_() % 2;
    flags_ = std::make_unique<GlobalBuffer<uint32_t>>(
        static_cast<size_t>(own_counts_ ? plan_.flag_count() : 0), "flags");
    flags_->fill(0);
    whole_y_ = std::make_unique<GlobalBuffer<T>>(static_cast<size_t>(m_) * n_, "whole y");
  }
  template <class Forward>
  Forward operands() {
    Forward f{};
    f.m = m_, f.n = n_, f.k = k_, f.x = x_.data(), f.x_pitch = x_.pitch();
    f.weight = w_.data(), f.weight_pitch = w_.pitch(), f.float_adapters = kSplit;
    if (with_bias_)
      f.bias = float_bias_ ? static_cast<const void*>(bias_floats_.data())
                           : static_cast<const void*>(bias_buffer_.data());
    f.float_bias = float_bias_, f.y = whole_y_->data(), f.s = with_s_ ? s_.data() : nullptr;
    f.workspace = workspace_->data(), f.counts = own_counts_ ? flags_->data() : nullptr;
    return f;
  }
  LoraDecodeParams<T> planned() {
    const LoraGroupedFactors factors = factors_.parameters();
    if (many_) {
      auto f = operands<LoraGroupedForward>();
      f.rows = rows_.parameters(), f.scaling = scalings_.data();
      f.factors.pool = factors;
      return lora_decode_params<T>(plan_, f, factors.entries);
    }
    auto f = operands<LoraLinearForward>();
    const LoraGroupedEntry of_list = factors.entries != nullptr
                                         ? factors.entries[0]
                                         : LoraGroupedEntry{factors.a, factors.b, factors.a_pitch,
                                                            factors.b_pitch, rows_.most_rank};
    f.rank = rows_.most_rank, f.scaling = scalings_[0];
    f.a = {of_list.a, of_list.a_pitch, 1}, f.b = {of_list.b, of_list.b_pitch, 1};
    return lora_decode_params<T>(plan_, f);
  }

  LoraDecodeParams<T> parameters() {
    LoraDecodeParams<T> p{};
    p.x = x_.data(), p.x_pitch = x_.pitch(), p.w = w_.data(), p.w_pitch = w_.pitch();
    if (with_bias_ && float_bias_) p.bias = bias_floats_.data();
    if (with_bias_ && !float_bias_) p.bias = bias_buffer_.data();
    p.float_bias = float_bias_;
    p.y = y_.data(), p.y_pitch = y_.pitch();
    p.s = with_s_ ? s_.data() : nullptr;
    p.m = m_, p.n = n_, p.k = k_;
    p.index = many_ ? rows_.buffer->data() : nullptr;
    p.groups = rows_.groups, p.most_rank = rows_.most_rank;
    p.factors = factors_.parameters();
    if (!many_) p.factors.ranks = nullptr;
    p.scaling = scalings_[0], p.scalings = many_ ? scalings_.data() : nullptr;
    p.sums = sums_->data(), p.s_sums = s_sums_->data();
    p.t = t_->data(), p.t_pitch = t_pitch(), p.width = width_;
    p.arrivals = flags_->data(), p.s_arrivals = p.arrivals + tiles();
    p.s_tiles = p.s_arrivals + s_tiles();
    return p;
  }

  T y_at(int row, int column) const {
    if (!by_plan_ || column >= n_) return y_(row, column);
    return (*whole_y_)[static_cast<size_t>(row) * n_ + column];
  }

  // Bits of Y and S, as numbers: NaN is equal to itself.
  std::vector<uint32_t> written() const {
    std::vector<uint32_t> bits;
    const auto add = [&](auto value) {
      uint32_t of_value = 0;
      memcpy(&of_value, &value, sizeof value);
      bits.push_back(of_value);
    };
    for (int i = 0; i < m_; ++i) {
      for (int j = 0; j < y_.width(); ++j) add(y_at(i, j));
      for (int r = 0; r < s_.width(); ++r) add(s_(i, r));
    }
    return bits;
  }

  // W is asked for once, X for each tile, also those of S, and A once where it lies in chunks. Of
  // 16 x 8 by 16 each warp multiplies all of its own.
  std::string compare_counters() {
    const emulator::Counters counted = emulator::counters();
    int64_t elements = int64_t{n_} * k_ + int64_t{tiles() + s_tiles()} * m_ * k_;
    int64_t low_rank = 0;
    std::vector<bool> taken(static_cast<size_t>(rows_.groups));
    for (const int adapter : rows_.adapter_of) {
      if (adapter < 0 || taken[static_cast<size_t>(adapter)]) continue;
      taken[static_cast<size_t>(adapter)] = true;
      if (factors_.a_in_chunks(adapter)) elements += int64_t{rows_.rank(adapter)} * k_;
      int batches = 0;
      for (int first = 0; first < m_; first += 8) {
        const auto begin = rows_.adapter_of.begin() + first;
        batches += std::count(begin, begin + std::min(8, m_ - first), adapter) > 0;
      }
      low_rank += int64_t{batches} * ((rows_.rank(adapter) + 15) / 16) * (kSplit ? 3 : 1);
    }
    const int64_t products =
        (int64_t{tiles() + s_tiles()} * steps() * 4 * Tile::kBlocks + int64_t{tiles()} * low_rank) *
        Tile::kWarps;
    const int64_t flop = products * 2 * 16 * 16 * 8;
    const auto copied = static_cast<int64_t>(
        counted.global_bytes[static_cast<int>(emulator::GlobalAccess::CpAsync)]);
    if (static_cast<int64_t>(counted.mma_flop) == flop && copied == 2 * elements) return "";
    return emulator::format(
        "expected %lld operations of tensor cores and %lld bytes, counted %lld and %lld",
        static_cast<long long>(flop), static_cast<long long>(2 * elements),
        static_cast<long long>(counted.mma_flop), static_cast<long long>(copied));
  }

  std::string compare() const {
    for (size_t i = 0; i < flags_->size(); ++i)
      if ((*flags_)[i] != 0) return emulator::format("flag %zu is left at %u", i, (*flags_)[i]);
    for (int row = 0; row < m_; ++row) {
      const int adapter = rows_.adapter_of[static_cast<size_t>(row)];
      if (spoiled_ >= 0 && adapter == spoiled_) continue;
      std::vector<Bounded> s;
      for (int r = 0; adapter >= 0 && r < rows_.rank(adapter); ++r)
        s.push_back(s_of(row, adapter, r));
      std::string difference = compare_s(row, s);
      for (int j = 0; j < y_.width() && difference.empty(); ++j)
        difference = compare_y(row, j, adapter, s);
      if (!difference.empty()) return difference;
    }
    return "";
  }

  // S in float64, with what halves of A and float sums may change.
  Bounded s_of(int row, int adapter, int rank) const {
    Bounded sum;
    for (int l = 0; l < k_; ++l)
      sum.add(x_.matrix(row, l) * kernels::as_halves<T, F>(factors_.a(adapter, rank, l)));
    return sum;
  }
  double error_of(const Bounded& sum) const {
    return numbers_ == Numbers::Integers ? 0 : sum.error();
  }

  std::string compare_s(int row, const std::vector<Bounded>& s) const {
    for (int r = 0; r < s_.width(); ++r) {
      if (static_cast<size_t>(r) >= s.size() || !with_s_) {
        const std::string difference = kernels::compare("s", row, r, s_(row, r), kUnwritten, 0);
        if (!difference.empty()) return difference;
        continue;
      }
      const Bounded& sum = s[static_cast<size_t>(r)];
      const std::string difference =
          kernels::compare("s", row, r, s_(row, r), sum.value, error_of(sum));
      if (!difference.empty()) return difference;
    }
    return "";
  }

  std::string compare_y(int row, int j, int adapter, const std::vector<Bounded>& of_row) const {
    if (j >= n_) return kernels::compare("y", row, j, y_(row, j), rounded_to<T>(kUnwritten), 0);
    Bounded sum;
    double error = 0;
    for (int l = 0; l < k_; ++l) sum.add(x_.matrix(row, l) * w_.matrix(j, l));
    if (with_bias_) sum.add(bias_(0, j));
    for (size_t r = 0; r < of_row.size(); ++r) {
      const Bounded& s = of_row[r];
      const double scaling = scalings_[static_cast<size_t>(many_ ? adapter : 0)];
      const double t = scaling * s.value,
                   b = kernels::as_halves<T, F>(factors_.b(adapter, j, static_cast<int>(r)));
      const double unit = kernels::rounding_unit<T>();
      const double lost = kSplit ? unit * unit * (1 + std::fabs(t)) + 0x1p-22 * std::fabs(t)
                                 : kernels::rounding_error<T>(std::fabs(t) + s.error());
      sum.add((numbers_ == Numbers::Integers ? as_kept(t) : t) * b);
      error += (scaling * s.error() + lost) * std::fabs(b);
      if (kSplit) error += unit * unit * std::fabs(t * b);
    }
    if (numbers_ == Numbers::Integers) {
      return kernels::compare("y", row, j, y_at(row, j), rounded_to<T>(sum.value), 0);
    }
    error += sum.error();
    error += kernels::rounding_error<T>(std::fabs(sum.value) + error);
    return kernels::compare("y", row, j, y_at(row, j), sum.value, error);
  }
  // Integers and halves of them, which one half may have to round.
  static double as_kept(double t) { return kSplit ? t : rounded_to<T>(t); }

  std::mt19937_64 random_;
  const int m_, n_, k_;
  const bool many_;
  const kernels::GroupedRows rows_;
  const Numbers numbers_;
  kernels::GroupedFactors<F> factors_;
  const kernels::Operand<T, kernels::Alignment::kVector> x_, w_;
  const bool float_bias_;
  const kernels::Matrix<T> bias_;
  const GlobalBuffer<T> bias_buffer_;
  const GlobalBuffer<float> bias_floats_;
  const GlobalBuffer<float> scalings_;
  kernels::WrittenRows<T> y_;
  kernels::WrittenRows<float> s_;
  const int width_;
  std::unique_ptr<GlobalBuffer<float>> sums_, s_sums_;
  std::unique_ptr<GlobalBuffer<T>> t_;
  std::unique_ptr<GlobalBuffer<uint32_t>> flags_;
  int blocks_ = 0;
  bool by_plan_ = false, own_counts_ = false;
  plan::Plan plan_{};
  std::unique_ptr<GlobalBuffer<unsigned char>> workspace_;
  std::unique_ptr<GlobalBuffer<T>> whole_y_;
  int spoiled_ = -1;  // an adapter full of NaN, which no other's rows may see
  const bool with_bias_ = random_() % 2, with_s_ = random_() % 3 != 0;
};

#define VARIANT(name, ...) {#name, [](const Case& run) { return Decode<__VA_ARGS__>(run).run(); }},
const std::vector<kernels::Variant> kVariants = {LORA_DECODE_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_decode",
                                {{"even", 64, 256, 256},
                                 {"odd", 64, 205, 331},
                                 {"deep", 64, 70, 1000},
                                 {"wide", 64, 600, 72},
                                 {"many_tiles", 2, 8321, 24},
                                 {"tiny", 3, 1, 5}},
                                lora_ext::kernel::kVariants);
}
