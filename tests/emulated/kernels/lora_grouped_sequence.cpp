// Runs the whole LoRA linear with many adapters, forward and backward, as the planner decides for a
// card, in one workspace of exactly the planned size; again, as a graph replays it, after the index
// has changed on the device; and compares two runs bit for bit.
#include "emulated/kernels/lora_grouped_sequence.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/experts_case.h"
#include "emulated/kernels/float64_values.h"
#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/linear_case.h"

namespace kernels {
namespace {

template <class T, class F>
class GroupedTest {
  static constexpr bool kSplit = std::is_same_v<F, float>;

  Random random_;
  const Size size_;
  const int m_ = size_.m, n_ = size_.n, k_ = size_.k;
  const int groups_ = draw_groups(size_.name), rank_ = draw_rank();
  const bool alike_ = draw(4) == 0;  // a pool without ranks
  GroupedRows rows_{m_, groups_, rank_, random_, alike_};
  const Numbers numbers_ = draw(2) ? Numbers::Integers : Numbers::Reals;
  const bool dropout_ = draw(2);
  const plan::Card card_ = draw_card();
  const plan::Choice choice_ = draw(2) ? plan::Choice::kKernel : plan::Choice::kHybrid;
  const GroupedFactors<F> factors_{rows_, n_, k_, numbers_, random_, 0.3};
  const VectorOperand<T> x_{m_, k_, numbers_, random_, "x", false};
  const VectorOperand<T> w_{n_, k_, numbers_, random_, "weight", false};
  const VectorOperand<T> dy_{m_, n_, numbers_, random_, "grad", false};
  const VectorOperand<T> base_{m_, n_, numbers_, random_, "base", false};
  const Bias<T> bias_{n_, numbers_, random_};
  const RandomMask mask_{numbers_, random_, true};
  std::vector<float> scalings_;
  std::unique_ptr<GlobalBuffer<float>> scaling_;
  const WrittenRows<float> s_{m_, rank_, false, NAN, "s"};

 public:
  explicit GroupedTest(const Case& run) : random_(run.seed), size_(run.size) {
    for (int g = 0; g < groups_; ++g) scalings_.push_back(exact() ? 0.5f : 0.3f + 0.1f * draw(9));
    scaling_ = std::make_unique<GlobalBuffer<float>>(scalings_, "scaling");
  }

  void run() {
    for (int calls = rows_.indexed && draw(3) == 0 ? 2 : 1; calls > 0; --calls) {
      forward_pass();
      backward_pass();
      rows_.turn_round();
    }
  }

 private:
  int draw(int count) { return static_cast<int>(random_() % static_cast<uint64_t>(count)); }
  // More groups than one launch writes entries for; or as many as fill 256 bytes with their counts,
  // except for the count of rows without an adapter.
  int draw_groups(const std::string& size) {
    if (size == "many") return draw(2) == 0 ? 64 : 3 * m_;
    return 1 + draw(size == "long" ? 2 : 6);
  }
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 12, 16, 40, 65};
    return kRanks[draw(std::size(kRanks))];
  }
  plan::Card draw_card() {
    const plan::Card cards[] = {ampere(kFewSms), small_ampere(), hopper(132)};
    return draw(2) ? ampere(kManySms) : cards[draw(std::size(cards))];
  }
  bool exact() const { return numbers_ == Numbers::Integers; }
  bool whole() const { return n_ % 8 == 0 && k_ % 8 == 0; }

  plan::Problem problem() const {
    plan::Problem p{.m = m_, .n = n_, .k = k_, .rank = rank_};
    p.float_adapters = kSplit, p.dropout = dropout_, p.aligned = whole();
    const bool listed = factors_.pool.parameters().entries != nullptr;
    p.groups = plan::Groups{groups_, rows_.indexed, listed};
    return p;
  }
  plan::Request request(bool backward) {
    plan::Request asked{choice_};
    if (draw(3) == 0) asked.choice = plan::Choice::kAuto;
    auto tiles = plan::tiles_of(card_, {backward, kSplit, dropout_});
    std::erase(tiles, plan::Tile::kDecode);  // which few rows take if no tile is requested
    if (draw(2)) asked.tile = tiles[draw(static_cast<int>(tiles.size()))];
    return asked;
  }
  LoraGroupedOperands operands(unsigned char* workspace) const {
    LoraGroupedOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rows = rows_.parameters(), o.scaling = scaling_->data();
    o.factors = {factors_.pool.parameters(), factors_.pool.list()};
    o.factors.pool.entries = nullptr, o.float_adapters = kSplit;
    if (alike_) o.factors.pool.ranks = nullptr;
    o.x = x_.data(), o.x_pitch = x_.pitch(), o.weight = w_.data(), o.weight_pitch = w_.pitch();
    o.dropout = dropout_, o.mask = mask_.parameters(), o.workspace = workspace;
    if (!dropout_) o.mask.keep_scale = 1;
    return o;
  }

  // Values as the kernels have them: drop(X), a factor, and halves of a float.
  double mask(int row, int column) const { return dropout_ ? mask_.factor(row, column) : 1; }
  Value x(int row, int column) const { return {mask(row, column) * x_.matrix(row, column)}; }
  Value factor(double value) const {
    return {as_halves<T, F>(value), exact() ? 0 : 0x1p-22 * std::fabs(value) + 0x1p-36};
  }
  Value halves(const Value& number, float scale) const {
    return scaled_halves<T>(number, scale, kSplit, exact());
  }
  // S of a row, s S, and dS.
  Value shrunk(int row, int r) const {
    Value sum;
    for (int l = 0; l < k_; ++l)
      sum.add(x(row, l), factor(factors_.a(rows_.adapter_of[row], r, l)));
    return sum.sum();
  }
  Value ds(int row, int r) const {
    Value sum;
    const int adapter = rows_.adapter_of[row];
    for (int l = 0; l < n_; ++l) sum.add({dy_.matrix(row, l)}, factor(factors_.b(adapter, l, r)));
    return halves(sum.sum(), scalings_[adapter]);
  }

  template <class Got>
  void check(const char* name, int row, int column, const Got& got, const Value& expected) const {
    compare_rounded(name, row, column, got, expected, exact());
  }

  void forward_pass() {
    plan::Problem p = problem();
    p.given_base = choice_ == plan::Choice::kHybrid && draw(2);
    const plan::Plan plan = plan::make_plan(card_, p, request(false));
    if (!plan.has_kernels()) differ("no kernel: %s", plan.reason.c_str());
    tell_plan("forward", plan);
    const bool with_bias = !p.given_base && draw(2);
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    std::vector<T> before;
    for (int calls = 2; calls > 0; --calls) {
      GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace), "workspace");
      LoraGroupedForward f{};
      static_cast<LoraGroupedOperands&>(f) = operands(workspace.data());
      f.bias = with_bias ? bias_.data(false) : nullptr, f.y = y.data(), f.s = s_.data();
      if (p.given_base) f.base = base_.data(), f.base_pitch = base_.pitch();
      emulator::Stream stream;
      grouped_forward<T>(stream, plan, f);
      run_timed(stream);
      if (calls == 1 && std::memcmp(before.data(), y.data(), before.size() * sizeof(T)) != 0)
        differ("a second run gives other bits of y");
      before = y.to_vector();
    }
    for (int row = 0; row < m_; ++row) {
      std::vector<Value> t;
      for (int r = 0; r < rows_.rank_of_row(row); ++r) {
        const Value s = shrunk(row, r);
        check("s", row, r, s_(row, r), s);
        t.push_back(halves(s, scalings_[rows_.adapter_of[row]]));
      }
      for (int j = 0; j < n_; ++j) {
        Value sum;
        for (int l = 0; l < k_ && !plan.hybrid(); ++l)
          sum.add({x_.matrix(row, l)}, {w_.matrix(j, l)});
        for (size_t r = 0; r < t.size(); ++r)
          sum.add(t[r], factor(factors_.b(rows_.adapter_of[row], j, static_cast<int>(r))));
        if (with_bias) sum.add({bias_.matrix(0, j)}, {1});
        if (p.given_base) sum.add({base_.matrix(row, j)}, {1});
        check("y", row, j, y[static_cast<size_t>(row) * n_ + j], sum.sum());
      }
    }
  }

  void backward_pass() {
    plan::Problem p = problem();
    p.backward = true;
    const int needs = draw(2) ? 7 : 1 + draw(7);
    p.need_dx = needs & 1, p.need_dlora_a = needs & 2, p.need_dlora_b = needs & 4;
    const plan::Plan plan = plan::make_plan(card_, p, request(true));
    if (!plan.has_kernels()) differ("no kernel: %s", plan.reason.c_str());
    tell_plan("backward", plan);
    GlobalBuffer<T> dx(static_cast<size_t>(p.need_dx ? m_ : 0) * k_, "dx");
    const bool pool = !p.groups->listed;
    GroupedGradients<F> gradients(rows_, n_, k_, pool), again(rows_, n_, k_, pool);
    for (auto* to : {&again, &gradients}) {
      GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace), "workspace");
      LoraGroupedBackward g{};
      static_cast<LoraGroupedOperands&>(g) = operands(workspace.data());
      g.dy = dy_.data(), g.dy_pitch = dy_.pitch(), g.s = s_.data();
      g.dx = p.need_dx ? dx.data() : nullptr;
      g.gradients = {to->pool.parameters(), to->pool.list()}, g.gradients.pool.entries = nullptr;
      g.gradients.pool.ranks = nullptr;  // those of the factors count
      g.need_da = p.need_dlora_a, g.need_db = p.need_dlora_b;
      emulator::Stream stream;
      grouped_backward<T>(stream, plan, g);
      run_timed(stream);
    }
    if (!gradients.same_bits(again)) differ("a second run gives other bits of the gradients");

    std::vector<std::vector<Value>> t(m_), scaled(m_);
    for (int row = 0; row < m_; ++row)
      for (int r = 0; r < rows_.rank_of_row(row); ++r) {
        t[row].push_back(ds(row, r));
        scaled[row].push_back(halves(shrunk(row, r), scalings_[rows_.adapter_of[row]]));
      }
    for (int row = 0; row < m_ && p.need_dx; ++row) {
      for (int j = 0; j < k_; ++j) {
        Value sum;
        for (int l = 0; l < n_ && !plan.hybrid(); ++l)
          sum.add({dy_.matrix(row, l)}, {w_.matrix(l, j)});
        for (size_t r = 0; r < t[row].size(); ++r) {
          const Value a = factor(factors_.a(rows_.adapter_of[row], static_cast<int>(r), j));
          sum.add(t[row][r], a.times(mask(row, j)));
        }
        check("dx", row, j, dx[static_cast<size_t>(row) * k_ + j], sum.sum());
      }
    }
    const auto gradient = [&](int adapter, const auto& term) {
      Value sum;
      for (int row = 0; row < m_; ++row)
        if (rows_.adapter_of[row] == adapter) term(sum, row);
      return sum.sum();
    };
    gradients.compare('a', p.need_dlora_a, exact(), [&](int g, int r, int column) {
      return gradient(g, [&](Value& sum, int row) { sum.add(t[row][r], x(row, column)); });
    });
    gradients.compare('b', p.need_dlora_b, exact(), [&](int g, int r, int column) {
      return gradient(
          g, [&](Value& sum, int row) { sum.add(scaled[row][r], {dy_.matrix(row, column)}); });
    });
  }

  void tell_plan(const std::string& direction, const plan::Plan& plan) const {
    const plan::Decode* decode = plan.decode();
    tell(direction + (decode != nullptr ? ", decode" : plan.hybrid() ? ", hybrid" : ", kernels"));
    const int64_t entries = decode != nullptr ? decode->entries : plan.tiled()->tables->entries;
    if (entries != plan::kNone) tell(direction + ", a list");
    if (entries == plan::kNone && alike_) tell(direction + ", a pool without ranks");
  }
};

template <class T, class F>
void run_variant(const Case& run) {
  limit_residency();
  GroupedTest<T, F>(run).run();
}
template <class T, class F>
void run_experts(const Case& run) {
  limit_residency();
  ExpertsTest<T, F>(run).run();
}

// X(variant, run, T, the factors' type)
#define VARIANTS(X)                                           \
  X(bf16, run_variant, __nv_bfloat16, __nv_bfloat16)          \
  IF_BOTH_TYPES(X(fp16, run_variant, __half, __half))         \
  X(float_bf16, run_variant, __nv_bfloat16, float)            \
  IF_BOTH_TYPES(X(float_fp16, run_variant, __half, float))    \
  X(experts_bf16, run_experts, __nv_bfloat16, __nv_bfloat16)  \
  IF_BOTH_TYPES(X(experts_fp16, run_experts, __half, __half)) \
  X(experts_float_bf16, run_experts, __nv_bfloat16, float)    \
  IF_BOTH_TYPES(X(experts_float_fp16, run_experts, __half, float))
#define VARIANT(name, run, T, F) {#name, run<T, F>},

}  // namespace

const Program program{"lora_grouped_sequence",
                      {VARIANTS(VARIANT)},
                      {{"even", 128, 136, 72},
                       {"odd", 131, 77, 99},
                       {"tall", 300, 24, 40},
                       {"long", 600, 16, 24},
                       {"wide", 20, 264, 200},
                       {"many", 40, 24, 32},
                       {"tiny", 1, 1, 5}}};

}  // namespace kernels
