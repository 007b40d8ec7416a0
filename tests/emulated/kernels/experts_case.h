// One projection of experts, each with its own W, forward and backward, as the planner decides for
// a card, in one workspace of exactly the planned size, twice, then with tables and T of the first time.
// Rows are gathered where they are read, and gradients are in PEFT's layout, in which the expert is
// B's fastest index.
#pragma once
#include "emulated/kernels/float64_values.h"
#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/lora_grouped_sequence.h"
#include "emulated/kernels/stored_operand.h"

namespace kernels {

// T: x's type; F: the factors' and their gradients'.
template <class T, class F>
class ExpertsTest {
  static constexpr bool kSplit = std::is_same_v<F, float>;

  Random random_;
  const int m_, n_, k_;
  // Of each expert one group of rows, or one for each of several adapters.
  const int each_ = 1 + (draw(3) == 0 ? draw(3) : 0);
  const int weights_ = 1 + draw(draw(2) ? 4 : 12 / each_), experts_ = weights_ * each_,
            rank_ = draw_rank(), width_ = padded(rank_);
  const int columns_ = width_ * (kSplit ? 2 : 1);
  const GroupedRows rows_{m_, experts_, rank_, random_, true, true};
  const Numbers numbers_ = draw(2) ? Numbers::Integers : Numbers::Reals;
  const bool dropout_ = draw(2), row_major_ = draw(3) != 0, odd_ = draw(3) == 0;
  const plan::Card card_ = draw_card();
  const int tokens_ = std::max(1, m_ / (1 + draw(4)));
  const bool second_ = draw(2);  // projection: its x is by position, and its y added up by token
  GlobalBuffer<int> token_{static_cast<size_t>(m_), "token"};
  GlobalBuffer<int> slot_{static_cast<size_t>(m_), "slot"};
  GlobalBuffer<float> row_weights_{static_cast<size_t>(m_), "weights of rows"};
  const bool weighted_ = draw(2);
  const Stored<T> x_{second_ ? m_ : tokens_, k_, false, false, !odd_, numbers_, 1, random_, "x"};
  const Stored<T> dy_{second_ ? tokens_ : m_, n_, false, false, !odd_, numbers_, 1, random_, "dy"};
  // A line of NaN after each W.
  const int lines_ = row_major_ ? n_ : k_;
  Stored<T> w_{weights_ * (lines_ + 1),
               row_major_ ? k_ : n_,
               false,
               false,
               !odd_,
               numbers_,
               1,
               random_,
               "weight"};
  const Bias<T> bias_{weights_ * n_, numbers_, random_};
  const RandomMask mask_{numbers_, random_, true};
  Matrix<F> a_of_ = random_matrix<F>(experts_ * rank_, k_, k_, numbers_, random_);
  Matrix<F> b_of_ = random_matrix<F>(n_, experts_* rank_, experts_* rank_, numbers_, random_);
  GlobalBuffer<T> a_{static_cast<size_t>(experts_) * columns_ * padded(k_), "pool of A"};
  GlobalBuffer<T> b_{static_cast<size_t>(experts_) * n_ * columns_, "pool of B"};
  std::vector<float> scalings_;
  std::unique_ptr<GlobalBuffer<float>> scaling_;
  const WrittenRows<float> s_{m_, rank_, false, NAN, "s"};
  int slice_ = weights_;  // experts of a launch

 public:
  explicit ExpertsTest(const Case& run)
      : random_(run.seed), m_(run.size.m), n_(run.size.n), k_(run.size.k) {
    for (int e = 0; e < experts_; ++e)
      scalings_.push_back(exact() ? 0.5f : 0.3f + 0.1f * static_cast<float>(draw(9)));
    scaling_ = std::make_unique<GlobalBuffer<float>>(scalings_, "scaling");
    for (int i = 0; i < m_; ++i) {
      token_[i] = draw(tokens_), slot_[i] = i;
      row_weights_[i] =
          exact() ? 0.5f * static_cast<float>(1 + draw(2)) : static_cast<float>(draw(1000)) / 1000;
    }
    std::shuffle(slot_.begin(), slot_.end(), random_);
    fill_pool();
    if (run.seed % 3 == 0) slice_ = 1 + static_cast<int>(run.seed / 3) % weights_;
  }

  void run() {
    forward_pass();
    backward_pass();
  }

 private:
  int draw(int count) { return static_cast<int>(random_() % static_cast<uint64_t>(count)); }
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 12, 16, 40};
    return kRanks[draw(std::size(kRanks))];
  }
  plan::Card draw_card() {
    const plan::Card cards[] = {ampere(kFewSms), ampere(kManySms), small_ampere(), hopper(132)};
    return cards[draw(std::size(cards))];
  }
  bool exact() const { return numbers_ == Numbers::Integers; }

  // Factors in halves; NaN in W, A and B of experts without rows.
  void fill_pool() {
    a_.fill(from_double<T>(0)), b_.fill(from_double<T>(0));
    const std::vector<int>& taken = rows_.adapter_of;
    for (int w = 0; w < weights_; ++w) {
      const auto has_it = [&](int e) { return e >= 0 && e / each_ == w; };
      const bool idle = std::none_of(taken.begin(), taken.end(), has_it);
      for (int line = idle ? 0 : lines_; line <= lines_; ++line)
        for (int i = 0; i < (row_major_ ? k_ : n_); ++i)
          w_.numbers.halves[w_.at(w * (lines_ + 1) + line, i)] = from_double<T>(NAN);
    }
    for (int e = 0; e < experts_; ++e) {
      const bool idle = std::find(taken.begin(), taken.end(), e) == taken.end();
      for (int r = 0; r < rank_; ++r) {
        const auto put = [&](T& hi, T& lo, F& factor) {
          if (!exact()) factor = from_double<F>(0.3 * to_double(factor));
          const double value = idle ? NAN : to_double(factor);
          hi = high_half<T>(static_cast<float>(value));
          if (kSplit) lo = low_half<T>(static_cast<float>(value));
        };
        const int64_t pitch = padded(k_), lo = kSplit ? width_ : 0;
        for (int c = 0; c < k_; ++c) {
          T* to = a_.data() + (e * columns_ + r) * pitch + c;
          put(to[0], to[lo * pitch], a_of_.at(e * rank_ + r, c));
        }
        for (int c = 0; c < n_; ++c) {
          T* to = b_.data() + (int64_t{e} * n_ + c) * columns_ + r;
          put(to[0], to[lo], b_of_.at(c, e * rank_ + r));
        }
      }
    }
  }

  plan::Problem problem(bool backward) const {
    plan::Problem p{.m = m_, .n = n_, .k = k_, .rank = rank_};
    p.float_adapters = kSplit, p.dropout = dropout_, p.backward = backward;
    p.dtype = std::is_same_v<T, __half> ? lora_ext::Dtype::kFloat16 : lora_ext::Dtype::kBFloat16;
    p.aligned = !odd_ && n_ % 8 == 0 && k_ % 8 == 0, p.aligned_weight = !odd_;
    p.weight_row_major = row_major_;
    p.groups = plan::Groups{experts_, false, false, true};
    return p;
  }
  plan::Plan planned(const plan::Problem& p) {
    plan::Request asked{draw(2) ? plan::Choice::kAuto : plan::Choice::kKernel};
    auto tiles = plan::tiles_of(card_, {p.backward, kSplit, dropout_});
    if (draw(2)) asked.tile = tiles[draw(static_cast<int>(tiles.size()))];
    if (asked.tile && card_.arch == 90) asked.tile = plan::Tile::kWgmma128x256;
    const plan::Plan plan = plan::make_plan(card_, p, asked);
    if (plan.tiled() == nullptr || plan.hybrid()) differ("no kernel: %s", plan.reason.c_str());
    tell(std::string(p.backward ? "backward" : "forward") + ", experts" +
         (plan.tiled()->gemm ? std::string(" on ") + facts_of(plan.tiled()->gemm->tile).name : ""));
    return plan;
  }
  LoraGroupedOperands operands(unsigned char* workspace) const {
    LoraGroupedOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rows = rows_.parameters(), o.scaling = scaling_->data();
    LoraGroupedFactors& pool = o.factors.pool;
    pool.a = const_cast<T*>(a_.data()), pool.b = const_cast<T*>(b_.data());
    pool.a_pitch = padded(k_), pool.b_pitch = columns_;
    pool.a_stride = columns_ * pool.a_pitch, pool.b_stride = int64_t{n_} * columns_;
    o.float_adapters = kSplit;
    o.x = x_.data(), o.x_pitch = x_.row_stride, o.weight = w_.data(),
    o.weight_pitch = w_.row_stride;
    o.weight_stride = (lines_ + 1) * w_.row_stride, o.bias_stride = n_, o.end_weight = weights_;
    o.groups_per_weight = each_;
    o.places = second_ ? LoraGroupedPlaces{nullptr, token_.data(), nullptr, slot_.data()}
                       : LoraGroupedPlaces{token_.data(), nullptr, nullptr, token_.data()};
    o.dropout = dropout_, o.mask = mask_.parameters(), o.workspace = workspace;
    if (!dropout_) o.mask.keep_scale = 1;
    return o;
  }

  // Launches for all experts, a slice of them after the other; the first one's alone, if all that
  // others compute is not wanted.
  template <class Operands, class Launch>
  void by_slices(Operands& o, bool wanted, const Launch& launch) const {
    for (int first = 0; first < (wanted ? weights_ : 1); first += slice_) {
      o.first_weight = first, o.end_weight = std::min(first + slice_, weights_);
      o.weight = static_cast<const T*>(w_.data()) + first * o.weight_stride;
      emulator::Stream stream;
      launch(stream);
      run_timed(stream);
    }
  }

  // Values as the kernels have them, at a position.
  double x(int at, int column) const { return x_.exact(second_ ? at : token_[at], column); }
  double dy(int at, int column) const { return dy_.exact(second_ ? token_[at] : at, column); }
  double mask(int at, int column) const {
    return dropout_ ? mask_.factor(second_ ? slot_[at] : token_[at], column) : 1;
  }
  double w(int e, int row, int column) const {
    const int line = e / each_ * (lines_ + 1);
    return row_major_ ? w_.exact(line + row, column) : w_.exact(line + column, row);
  }
  Value factor(double value) const {
    return {as_halves<T, F>(value), exact() ? 0 : 0x1p-22 * std::fabs(value) + 0x1p-36};
  }
  Value a(int e, int r, int column) const { return factor(a_of_(e * rank_ + r, column)); }
  Value b(int e, int row, int r) const { return factor(b_of_(row, e * rank_ + r)); }
  Value halves(const Value& number, float scale) const {
    return scaled_halves<T>(number, scale, kSplit, exact());
  }
  Value shrunk(int at, int e, int r) const {
    Value sum;
    for (int l = 0; l < k_; ++l) sum.add({mask(at, l) * x(at, l)}, a(e, r, l));
    return sum.sum();
  }
  Value of_dy(int at, int e, int r) const {
    Value sum;
    for (int l = 0; l < n_; ++l) sum.add({dy(at, l)}, b(e, l, r));
    return sum.sum();
  }
  float weight_of(int at) const { return weighted_ ? row_weights_[second_ ? slot_[at] : at] : 1; }

  template <class Got>
  void check(const char* name, int row, int column, const Got& got, const Value& expected) const {
    compare_rounded(name, row, column, got, expected, exact());
  }

  void forward_pass() {
    const plan::Plan plan = planned(problem(false));
    const bool with_bias = draw(2), float_bias = draw(2);
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    std::vector<T> before;
    const auto size = static_cast<size_t>(plan.workspace);
    GlobalBuffer<unsigned char> first(size, "first workspace"), second(size, "workspace");
    for (int calls = 2; calls > 0; --calls) {
      y.fill(from_double<T>(NAN));
      LoraGroupedForward f{};
      static_cast<LoraGroupedOperands&>(f) = operands((calls == 2 ? first : second).data());
      if (calls == 1)  // as the first call has made them
        f.tables = first.data(), f.t = first.data() + plan.tiled()->t;
      f.bias = with_bias ? bias_.data(float_bias) : nullptr, f.float_bias = float_bias;
      f.y = y.data(), f.s = s_.data();
      by_slices(f, true, [&](auto& stream) { grouped_forward<T>(stream, plan, f); });
      if (calls == 1 && std::memcmp(before.data(), y.data(), before.size() * sizeof(T)) != 0)
        differ("a second run gives other bits of y");
      before = y.to_vector();
    }
    for (int at = 0; at < m_; ++at) {
      const int e = rows_.adapter_of[at];
      std::vector<Value> t;
      for (int r = 0; e >= 0 && r < rank_; ++r) {
        const Value s = shrunk(at, e, r);
        check("s", at, r, s_(at, r), s);
        t.push_back(halves(s, scalings_[e]));
      }
      for (int j = 0; j < n_; ++j) {
        Value sum;
        for (int l = 0; e >= 0 && l < k_; ++l) sum.add({x(at, l)}, {w(e, j, l)});
        for (int r = 0; e >= 0 && r < rank_; ++r) sum.add(t[r], b(e, j, r));
        if (e >= 0 && with_bias) sum.add({bias_.matrix(0, e / each_ * n_ + j)}, {1});
        check("y", at, j, y[static_cast<size_t>(at) * n_ + j], sum.sum());
      }
    }
  }

  // In PEFT's layout: dA [experts * rank, k], dB [n, rank, experts].
  struct Gradients {
    const int64_t experts, rank, n, k;
    GlobalBuffer<F> a{static_cast<size_t>(experts * rank * k), "da"};
    GlobalBuffer<F> b{static_cast<size_t>(n * rank * experts), "db"};

    explicit Gradients(const ExpertsTest& of)
        : experts(of.experts_), rank(of.rank_), n(of.n_), k(of.k_) {
      a.fill(from_double<F>(NAN)), b.fill(from_double<F>(NAN));
    }
    LoraGroupedFactors pool() {
      return {nullptr, a.data(), b.data(), rank * k, 1, k, rank * experts, nullptr, experts};
    }
    bool same_bits(const Gradients& other) const {
      return std::memcmp(a.data(), other.a.data(), a.size() * sizeof(F)) == 0 &&
             std::memcmp(b.data(), other.b.data(), b.size() * sizeof(F)) == 0;
    }
  };

  void backward_pass() {
    plan::Problem p = problem(true);
    const int needs = draw(2) ? 7 : 1 + draw(7);
    p.need_dx = needs & 1, p.need_dlora_a = needs & 2, p.need_dlora_b = needs & 4;
    const plan::Plan plan = planned(p);
    GlobalBuffer<T> dx(static_cast<size_t>(p.need_dx ? m_ : 0) * k_, "dx");
    Gradients gradients(*this), again(*this);
    const auto size = static_cast<size_t>(plan.workspace);
    GlobalBuffer<unsigned char> first(size, "first workspace"), second(size, "workspace");
    for (Gradients* to : {&again, &gradients}) {
      dx.fill(from_double<T>(NAN));
      LoraGroupedBackward g{};
      static_cast<LoraGroupedOperands&>(g) = operands((to == &again ? first : second).data());
      if (to == &gradients) g.tables = first.data();
      g.dy = dy_.data(), g.dy_pitch = dy_.row_stride, g.s = s_.data();
      g.dx = p.need_dx ? dx.data() : nullptr;
      g.gradients.pool = to->pool();
      g.need_da = p.need_dlora_a, g.need_db = p.need_dlora_b;
      if (weighted_) g.row_weights = {row_weights_.data(), true, second_ ? slot_.data() : nullptr};
      by_slices(g, p.need_dx, [&](auto& stream) { grouped_backward<T>(stream, plan, g); });
    }
    if (!gradients.same_bits(again)) differ("a second run gives other bits of the gradients");

    std::vector<std::vector<Value>> raw_ds(m_), raw_s(m_);
    for (int at = 0; at < m_; ++at) {
      const int e = rows_.adapter_of[at];
      for (int r = 0; e >= 0 && r < rank_; ++r)
        raw_ds[at].push_back(of_dy(at, e, r)), raw_s[at].push_back(shrunk(at, e, r));
    }
    for (int at = 0; at < m_ && p.need_dx; ++at) {
      const int e = rows_.adapter_of[at];
      std::vector<Value> t;
      for (int r = 0; e >= 0 && r < rank_; ++r) t.push_back(halves(raw_ds[at][r], scalings_[e]));
      for (int j = 0; j < k_; ++j) {
        Value sum;
        for (int l = 0; e >= 0 && l < n_; ++l) sum.add({dy(at, l)}, {w(e, l, j)});
        for (int r = 0; e >= 0 && r < rank_; ++r) sum.add(t[r], a(e, r, j).times(mask(at, j)));
        check("dx", at, j, dx[static_cast<size_t>(at) * k_ + j], sum.sum());
      }
    }
    const auto gradient = [&](int e, int r, const auto& rows, const auto& p_of) {
      Value sum;
      for (int at = 0; at < m_; ++at)
        if (rows_.adapter_of[at] == e)
          sum.add(halves(rows[at][r], scalings_[e] * weight_of(at)), {p_of(at)});
      return sum.sum();
    };
    for (int e = 0; e < experts_; ++e)
      for (int r = 0; r < rank_; ++r) {
        const int row = e * rank_ + r;
        for (int c = 0; p.need_dlora_a && c < k_; ++c)
          check("da", row, c, gradients.a[static_cast<size_t>(row) * k_ + c],
                gradient(e, r, raw_ds, [&](int at) { return mask(at, c) * x(at, c); }));
        for (int c = 0; p.need_dlora_b && c < n_; ++c)
          check("db", row, c, gradients.b[(static_cast<size_t>(c) * rank_ + r) * experts_ + e],
                gradient(e, r, raw_s, [&](int at) { return dy(at, c); }));
      }
  }
};

}  // namespace kernels
