// Runs lora_decode with one adapter for all rows, or with one per row: ranks that differ, rows
// without an adapter, factors in a pool or a list, aligned or not, NaN in one of them; on grids of
// any size, or as planned for some card, in a workspace of exactly the planned size; twice, and
// compares the second result with the first bit by bit.
#include "emulated/kernels/lora_decode.h"

#include <optional>
#include <set>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/launch.h"
#include "emulated/kernels/linear_case.h"
#include "kernels/decode/launch.h"

namespace kernels {
namespace {

constexpr float kUnwritten = -12345;

template <class T>
double rounded_to(double value) {
  return to_double(from_double<T>(value));
}

// The rows of a call with one adapter.
GroupedRows rows_of_one(int m, int rank, Random& random) {
  GroupedRows rows(m, 1, rank, random);
  rows.ranks.assign(1, rank), rows.adapter_of.assign(static_cast<size_t>(m), 0);
  return rows;
}
// Rows with an adapter each, or none: an index.
GroupedRows rows_of_many(int m, int rank, Random& random) {
  const int most = random() % 2 ? 3 : 2 * m;
  const int groups = 1 + static_cast<int>(random() % static_cast<uint64_t>(most));
  while (true) {
    GroupedRows rows(m, groups, rank, random);
    if (!rows.indexed) continue;
    // The last row is the first of its adapter, if there is one left.
    for (int g = 0; groups % 2 == 0 && g < groups; ++g) {
      const bool taken = std::count(rows.adapter_of.begin(), rows.adapter_of.end(), g) > 0;
      if (!taken && rows.rank(g) > 0) (*rows.buffer)[m - 1] = rows.adapter_of[m - 1] = g;
    }
    if (random() % 8 == 0) {  // no row has an adapter
      std::fill(rows.buffer->begin(), rows.buffer->end(), -1);
      std::fill(rows.adapter_of.begin(), rows.adapter_of.end(), -1);
    }
    return rows;
  }
}

template <class T, class F, int kBatch>
class Decode {
  using Tile = LoraDecodeTile<kBatch>;

  static constexpr bool kSplit = std::is_same_v<F, float>;

  Random random_;
  const Size size_;
  const int m_ = draw_rows(size_.m), n_ = size_.n, k_ = size_.k;
  const bool many_ = random_() % 2;
  const int rank_ = draw_rank();
  const GroupedRows rows_ =
      many_ ? rows_of_many(m_, rank_, random_) : rows_of_one(m_, rank_, random_);
  const Numbers numbers_ = random_() % 2 ? Numbers::Integers : Numbers::Reals;
  GroupedFactors<F> factors_{rows_, n_, k_, numbers_, random_, kSplit ? 0.02 : 1};
  const VectorOperand<T> x_{m_, k_, numbers_, random_, "x", false};
  const VectorOperand<T> w_{n_, k_, numbers_, random_, "w", false};
  const bool float_bias_ = random_() % 2;
  const Bias<T> bias_{n_, numbers_, random_};
  const GlobalBuffer<float> scalings_{draw_scalings(), "scalings"};
  const WrittenRows<float> s_{m_, rank_, false, kUnwritten, "s"};
  const int width_ = (rank_ + 15) / 16 * 16;
  int spoiled_ = -1;  // an adapter full of NaN, which must not reach rows of others
  const bool with_bias_ = random_() % 2, with_s_ = random_() % 3 != 0;
  std::optional<WrittenRows<T>> y_;
  std::unique_ptr<GlobalBuffer<uint32_t>> flags_;
  // By the planner, or with a layout drawn here.
  bool by_plan_ = false, own_counts_ = false;
  plan::Plan plan_;
  std::unique_ptr<GlobalBuffer<unsigned char>> workspace_;
  int blocks_ = 0;
  std::unique_ptr<GlobalBuffer<float>> sums_, s_sums_;
  std::unique_ptr<GlobalBuffer<T>> t_;

 public:
  explicit Decode(const Case& run) : random_(run.seed), size_(run.size) {
    if (many_ && random_() % 2) spoiled_ = rows_.adapter_of[random_() % static_cast<uint64_t>(m_)];
    if (spoiled_ >= 0) factors_.spoil(spoiled_);
    // The plan has the instance for the number of rows of X, or none if A has too many rows.
    const int adapters = std::min(rows_.groups, m_), kMaxRows = 4096;
    by_plan_ = random_() % 2 && plan::decode_tile_for(m_).batch == kBatch &&
               adapters * width_ * (kSplit ? 2 : 1) <= kMaxRows;
    y_.emplace(m_, by_plan_ ? n_ : n_ + 3, false, from_double<T>(kUnwritten), "y");
    by_plan_ ? make_plan() : lay_out();
  }

  void run() {
    emulator::Stream stream;
    Launch launcher{stream};
    if (by_plan_ && plan_.decode() == nullptr)
      differ("the plan is another: %s", plan_.describe().c_str());
    const LoraDecodeParams<T> params = by_plan_ ? planned() : parameters();
    const auto launch = [&] {
      if (by_plan_) {
        launch_lora_decode<T, F>(*plan_.decode(), params, !own_counts_, launcher);
        return run_timed(stream);
      }
      stream.launch({.grid = dim3(static_cast<unsigned>(blocks_)),
                     .block = dim3(Tile::kThreads),
                     .shared_bytes = Tile::kSharedBytes},
                    lora_decode_sm80<T, F, kBatch>, params);
      run_timed(stream);
    };
    launch();
    compare_counters();
    check();
    if (random_() % 3 != 0) return;
    const auto first = written();
    launch();
    if (written() != first) differ("a second launch has other bits");
  }

 private:
  int draw_rows(int most) {
    const int whole = std::min(most, kBatch);
    return random_() % 3 == 0 ? whole
                              : 1 + static_cast<int>(random_() % static_cast<uint64_t>(whole));
  }
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 13, 16, 17, 40, 64, 70};
    return kRanks[random_() % std::size(kRanks)];
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
  std::set<int> adapters() const {
    std::set<int> taken(rows_.adapter_of.begin(), rows_.adapter_of.end());
    taken.erase(-1);
    return taken;
  }
  int row_blocks() const {
    int count = 0;
    for (const int adapter : adapters())
      count += (rows_.rank(adapter) + 15) / 16 * (kSplit ? 2 : 1);
    return count;
  }
  // Tiles of the adapters that rows take, which may be fewer than the plan has room for.
  int s_tiles() const { return (row_blocks() * 16 + Tile::kRows - 1) / Tile::kRows; }

  // Grids of one block, of as many as there may be, and of any in between.
  void lay_out() {
    const int most = std::max(1, tiles() * steps() / plan::DecodeShares::kMinUnits);
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
    const plan::Card cards[] = {ampere(kManySms), ampere(kFewSms), small_ampere(), hopper(4)};
    const plan::Card& card = cards[random_() % std::size(cards)];
    plan::Problem problem{.m = m_, .n = n_, .k = k_, .rank = rank_};
    problem.float_adapters = kSplit;
    if (many_) problem.groups = plan::Groups{rows_.groups, true};
    plan_ = plan::make_plan(card, problem, {plan::Choice::kKernel});
    workspace_ = std::make_unique<GlobalBuffer<unsigned char>>(static_cast<size_t>(plan_.workspace),
                                                               "workspace");
    own_counts_ = random_() % 2;
    flags_ = std::make_unique<GlobalBuffer<uint32_t>>(
        static_cast<size_t>(own_counts_ ? plan_.decode()->flag_count() : 0), "flags");
    flags_->fill(0);
  }
  template <class Forward>
  Forward operands() {
    Forward f{};
    f.m = m_, f.n = n_, f.k = k_, f.x = x_.data(), f.x_pitch = x_.pitch();
    f.weight = w_.data(), f.weight_pitch = w_.pitch(), f.float_adapters = kSplit;
    f.bias = with_bias_ ? bias_.data(float_bias_) : nullptr, f.float_bias = float_bias_;
    f.y = y_->data(), f.s = with_s_ ? s_.data() : nullptr;
    f.workspace = workspace_->data(), f.counts = own_counts_ ? flags_->data() : nullptr;
    return f;
  }
  LoraDecodeParams<T> planned() {
    const LoraGroupedFactors factors = factors_.pool.parameters();
    if (many_) {
      auto f = operands<LoraGroupedForward>();
      f.rows = rows_.parameters(), f.scaling = scalings_.data();
      f.factors.pool = factors;
      return lora_decode_params<T>(*plan_.decode(), f, factors.entries);
    }
    auto f = operands<LoraLinearForward>();
    const LoraGroupedEntry& one = factors_.pool.entries[0];
    f.rank = rank_, f.scaling = scalings_[0];
    f.a = {one.a, one.a_pitch, 1}, f.b = {one.b, one.b_pitch, 1};
    return lora_decode_params<T>(*plan_.decode(), f);
  }

  LoraDecodeParams<T> parameters() {
    LoraDecodeParams<T> p{};
    p.x = x_.data(), p.x_pitch = x_.pitch(), p.w = w_.data(), p.w_pitch = w_.pitch();
    p.bias = with_bias_ ? bias_.data(float_bias_) : nullptr, p.float_bias = float_bias_;
    p.y = y_->data(), p.y_pitch = y_->pitch();
    p.s = with_s_ ? s_.data() : nullptr;
    p.m = m_, p.n = n_, p.k = k_;
    p.index = many_ ? rows_.buffer->data() : nullptr;
    p.groups = rows_.groups, p.max_rank = rank_;
    p.factors = factors_.pool.parameters();
    if (!many_) p.factors.ranks = nullptr;
    p.scaling = scalings_[0], p.scalings = many_ ? scalings_.data() : nullptr;
    p.sums = sums_->data(), p.s_sums = s_sums_->data();
    p.t = t_->data(), p.t_pitch = t_pitch(), p.width = width_;
    p.arrivals = flags_->data(), p.s_arrivals = p.arrivals + tiles();
    p.s_tiles = p.s_arrivals + s_tiles();
    return p;
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
      for (int j = 0; j < y_->width(); ++j) add((*y_)(i, j));
      for (int r = 0; r < s_.width(); ++r) add(s_(i, r));
    }
    return bits;
  }

  // Reads W once, X once per tile, including those of S, and A once if it consists of chunks. Each
  // warp multiplies all of its blocks of 16 x 8 by 16.
  void compare_counters() {
    int64_t elements = int64_t{n_} * k_ + int64_t{tiles() + s_tiles()} * m_ * k_;
    int64_t low_rank = 0;
    for (const int adapter : adapters()) {
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
    compare_count("operations of tensor cores", emulator::counters().mma_flop,
                  products * 2 * 16 * 16 * 8);
    compare_copied_bytes(2 * elements);
  }

  void check() const {
    for (size_t i = 0; i < flags_->size(); ++i)
      if ((*flags_)[i] != 0) differ("flag %zu is left at %u", i, (*flags_)[i]);
    for (int row = 0; row < m_; ++row) {
      const int adapter = rows_.adapter_of[static_cast<size_t>(row)];
      if (spoiled_ >= 0 && adapter == spoiled_) continue;
      std::vector<Bounded> s;
      for (int r = 0; r < rows_.rank_of_row(row); ++r) s.push_back(s_of(row, adapter, r));
      for (int r = 0; r < rank_; ++r) {
        const bool is_there = with_s_ && static_cast<size_t>(r) < s.size();
        compare("s", row, r, s_(row, r), is_there ? s[r].value : kUnwritten,
                is_there && !exact() ? s[r].error() : 0);
      }
      for (int j = 0; j < y_->width(); ++j) check_y(row, j, adapter, s);
    }
  }

  // S in float64, with the error that halves of A and float sums may have.
  Bounded s_of(int row, int adapter, int rank) const {
    Bounded sum;
    for (int l = 0; l < k_; ++l)
      sum.add(x_.matrix(row, l) * as_halves<T, F>(factors_.a(adapter, rank, l)));
    return sum;
  }
  bool exact() const { return numbers_ == Numbers::Integers; }

  void check_y(int row, int j, int adapter, const std::vector<Bounded>& of_row) const {
    const T got = (*y_)(row, j);
    if (j >= n_) return compare("y", row, j, got, rounded_to<T>(kUnwritten), 0);
    Bounded sum;
    double error = 0;
    for (int l = 0; l < k_; ++l) sum.add(x_.matrix(row, l) * w_.matrix(j, l));
    if (with_bias_) sum.add(bias_.matrix(0, j));
    for (size_t r = 0; r < of_row.size(); ++r) {
      const Bounded& s = of_row[r];
      const double scaling = scalings_[static_cast<size_t>(many_ ? adapter : 0)];
      const double t = scaling * s.value,
                   b = as_halves<T, F>(factors_.b(adapter, j, static_cast<int>(r)));
      const double unit = rounding_unit<T>();
      const double lost = kSplit ? unit * unit * (1 + std::fabs(t)) + 0x1p-22 * std::fabs(t)
                                 : rounding_error<T>(std::fabs(t) + s.error());
      sum.add((exact() ? as_kept(t) : t) * b);
      error += (scaling * s.error() + lost) * std::fabs(b);
      if (kSplit) error += unit * unit * std::fabs(t * b);
    }
    if (exact()) return compare("y", row, j, got, rounded_to<T>(sum.value), 0);
    error += sum.error();
    compare("y", row, j, got, sum.value, error + rounding_error<T>(std::fabs(sum.value) + error));
  }
  // Integers and halves of them, which one half may have to round.
  static double as_kept(double t) { return kSplit ? t : rounded_to<T>(t); }
};

}  // namespace

#define VARIANT(name, ...) {#name, [](const Case& run) { return Decode<__VA_ARGS__>(run).run(); }},
const Program program{"lora_decode",
                      {LORA_DECODE_VARIANTS(VARIANT)},
                      {{"even", 64, 256, 256},
                       {"odd", 64, 205, 331},
                       {"deep", 64, 70, 1000},
                       {"wide", 64, 600, 72},
                       {"many_tiles", 2, 8321, 24},
                       {"tiny", 3, 1, 5}}};

}  // namespace kernels
