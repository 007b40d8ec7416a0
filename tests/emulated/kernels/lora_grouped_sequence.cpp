// Runs the whole LoRA linear with many adapters, forward and backward, as the planner decides for a
// card, in one workspace of exactly the planned size; again, as a graph replays it, after the index
// has changed on the device; and compares two runs bit for bit.
#include "emulated/kernels/lora_grouped_sequence.h"

#include "emulated/kernels/grouped_factors.h"
#include "emulated/kernels/grouped_gradients.h"
#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/variants.h"

namespace lora_ext::kernel {
namespace {

using emulator::GlobalBuffer;
using kernels::Bounded;
using kernels::Case;
using kernels::Numbers;

// A number and by how much kernels may be off.
struct Value {
  double value = 0, error = 0, magnitude = 0;
  int terms = 0;
  void add(const Value& a, const Value& b) {
    value += a.value * b.value, magnitude += std::fabs(a.value * b.value), ++terms;
    error += a.error * (std::fabs(b.value) + b.error) + std::fabs(a.value) * b.error;
  }
  Value sum() const {
    return {value, error + (terms + 8) * 3 * 0x1p-23 * (magnitude + error), magnitude, terms};
  }
};

template <class T, class F>
class GroupedTest {
 public:
  explicit GroupedTest(const Case& run)
      : random_(run.seed),
        m_(run.size.m),
        n_(run.size.n),
        k_(run.size.k),
        // More than a launch writes entries of; or as many as fill 256 bytes with their counts, but
        // for those of no adapter.
        groups_(std::string(run.size.name) == "many"   ? (draw(2) == 0 ? 64 : 2 * m_)
                : std::string(run.size.name) == "long" ? 1 + draw(2)
                                                       : 1 + draw(6)),
        rows_(m_, groups_, draw_rank(), random_),
        numbers_(draw(2) ? Numbers::Integers : Numbers::Reals),
        dropout_(draw(2)),
        card_(draw_card()),
        choice_(draw(2) ? plan::Choice::kKernel : plan::Choice::kHybrid),
        factors_(rows_, n_, k_, numbers_, random_, 0.3),
        x_(m_, k_, numbers_, random_, "x", false),
        w_(n_, k_, numbers_, random_, "weight", false),
        dy_(m_, n_, numbers_, random_, "grad", false),
        base_(m_, n_, numbers_, random_, "base", false),
        bias_(kernels::random_matrix<T>(1, n_, n_, numbers_, random_)),
        bias_buffer_(bias_.values, "bias"),
        mask_(numbers_, random_, true),
        ranks_(rows_.ranks, "ranks"),
        s_(static_cast<size_t>(m_) * rows_.most_rank, "s") {
    for (int g = 0; g < groups_; ++g) scalings_.push_back(exact() ? 0.5f : 0.3f + 0.1f * draw(9));
    scaling_ = std::make_unique<GlobalBuffer<float>>(scalings_, "scaling");
    s_.fill(NAN);
  }

  std::string run() {
    for (int calls = rows_.indexed && draw(3) == 0 ? 2 : 1; calls > 0; --calls) {
      std::string difference = forward_pass();
      if (difference.empty()) difference = backward_pass();
      if (!difference.empty()) return difference;
      rows_.turn_round();
    }
    return "";
  }

 private:
  static constexpr bool kSplit = std::is_same_v<F, float>;
  int draw(int count) { return static_cast<int>(random_() % static_cast<uint64_t>(count)); }
  int draw_rank() {
    constexpr int kRanks[] = {1, 8, 12, 16, 40, 65};
    return kRanks[draw(std::size(kRanks))];
  }
  plan::Card draw_card() {
    const plan::Card cards[] = {kernels::ampere(kernels::kFewSms), kernels::small_ampere(),
                                kernels::hopper(132)};
    return draw(2) ? kernels::ampere(kernels::kManySms) : cards[draw(std::size(cards))];
  }
  bool exact() const { return numbers_ == Numbers::Integers; }
  bool whole() const { return n_ % 8 == 0 && k_ % 8 == 0; }

  plan::GroupedProblem problem() const {
    plan::GroupedProblem p{{.m = m_, .n = n_, .k = k_, .rank = rows_.most_rank}, groups_};
    p.one.float_adapters = kSplit, p.one.dropout = dropout_, p.one.aligned = whole();
    p.indexed = rows_.indexed, p.listed = factors_.parameters().entries != nullptr;
    return p;
  }
  plan::Request request(bool backward) {
    plan::Request asked{choice_};
    if (draw(3) == 0) asked.choice = plan::Choice::kAuto;
    auto tiles = plan::tiles_of(card_, {backward, kSplit, dropout_});
    std::erase(tiles, plan::Tile::kDecode);  // which few rows take where no tile is asked for
    if (draw(2)) asked.tile = tiles[draw(static_cast<int>(tiles.size()))];
    return asked;
  }
  LoraGroupedOperands operands(unsigned char* workspace) const {
    LoraGroupedOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rows = rows_.parameters(), o.scaling = scaling_->data();
    o.factors = {factors_.parameters(), factors_.list()};
    o.factors.pool.entries = nullptr, o.float_adapters = kSplit;
    o.x = x_.data(), o.x_pitch = x_.pitch(), o.weight = w_.data(), o.weight_pitch = w_.pitch();
    o.dropout = dropout_, o.mask = mask_.parameters(), o.workspace = workspace;
    if (!dropout_) o.mask.keep_scale = 1;
    return o;
  }

  // As kernels have them: drop(X), a factor, and halves of a float.
  double mask(int row, int column) const { return dropout_ ? mask_.factor(row, column) : 1; }
  Value x(int row, int column) const { return {mask(row, column) * x_.matrix(row, column)}; }
  Value factor(double value) const {
    return {kernels::as_halves<T, F>(value), exact() ? 0 : 0x1p-22 * std::fabs(value) + 0x1p-36};
  }
  Value halves(Value v, float scale) const {
    v.value *= scale, v.error *= scale;
    const double unit = kernels::rounding_unit<T>();
    const double relative = (kSplit ? unit * unit : unit) + 0x1p-23;
    if (exact()) {
      if (!kSplit) v.value = kernels::to_double(kernels::from_double<T>(v.value));
      return v;
    }
    v.error += relative * (std::fabs(v.value) + v.error) + 0x1p-25 / (kSplit ? kLoScale<T> : 1.f);
    return v;
  }
  int rank_of_row(int row) const {
    const int adapter = rows_.adapter_of[row];
    return adapter < 0 ? 0 : rows_.rank(adapter);
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
  std::string compare(const char* name, int row, int column, const Got& got, Value expected) const {
    const double rounded = kernels::to_double(kernels::from_double<Got>(expected.value));
    const double error =
        expected.error + kernels::rounding_error<Got>(std::fabs(expected.value) + expected.error);
    return kernels::compare(name, row, column, got, exact() ? rounded : expected.value,
                            exact() ? 0 : error);
  }

  std::string forward_pass() {
    plan::GroupedProblem p = problem();
    p.one.given_base = choice_ == plan::Choice::kHybrid && draw(2);
    const plan::GroupedPlan plan = plan::grouped_forward(card_, p, request(false));
    if (!plan.one.kernel) return "no kernel: " + plan.one.reason;
    tell_plan("forward", plan);
    const bool with_bias = !p.one.given_base && draw(2);
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    std::vector<T> before;
    for (int calls = 2; calls > 0; --calls) {
      GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.one.workspace), "workspace");
      LoraGroupedForward f{};
      static_cast<LoraGroupedOperands&>(f) = operands(workspace.data());
      f.bias = with_bias ? bias_buffer_.data() : nullptr, f.y = y.data(), f.s = s_.data();
      if (p.one.given_base) f.base = base_.data(), f.base_pitch = base_.pitch();
      emulator::Stream stream;
      grouped_forward<T>(stream, plan, f);
      kernels::run_timed(stream);
      if (calls == 1 && std::memcmp(before.data(), y.data(), before.size() * sizeof(T)) != 0)
        return "a second run gives other bits of y";
      before = y.to_vector();
    }
    for (int row = 0; row < m_; ++row) {
      std::vector<Value> t;
      for (int r = 0; r < rank_of_row(row); ++r) {
        const Value s = shrunk(row, r);
        const std::string difference =
            compare("s", row, r, s_[static_cast<size_t>(row) * rows_.most_rank + r], s);
        if (!difference.empty()) return difference;
        t.push_back(halves(s, scalings_[rows_.adapter_of[row]]));
      }
      for (int j = 0; j < n_; ++j) {
        Value sum;
        for (int l = 0; l < k_ && !plan.one.hybrid; ++l)
          sum.add({x_.matrix(row, l)}, {w_.matrix(j, l)});
        for (size_t r = 0; r < t.size(); ++r)
          sum.add(t[r], factor(factors_.b(rows_.adapter_of[row], j, static_cast<int>(r))));
        if (with_bias) sum.add({bias_(0, j)}, {1});
        if (p.one.given_base) sum.add({base_.matrix(row, j)}, {1});
        const std::string difference =
            compare("y", row, j, y[static_cast<size_t>(row) * n_ + j], sum.sum());
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }

  std::string backward_pass() {
    plan::GroupedProblem p = problem();
    const int needs = draw(2) ? 7 : 1 + draw(7);
    p.one.need_dx = needs & 1, p.one.need_dlora_a = needs & 2, p.one.need_dlora_b = needs & 4;
    const plan::GroupedPlan plan = plan::grouped_backward(card_, p, request(true));
    if (!plan.one.kernel) return "no kernel: " + plan.one.reason;
    tell_plan("backward", plan);
    GlobalBuffer<T> dx(static_cast<size_t>(p.one.need_dx ? m_ : 0) * k_, "dx");
    kernels::GroupedGradients<F> gradients(rows_, n_, k_, !p.listed),
        again(rows_, n_, k_, !p.listed);
    for (auto* to : {&again, &gradients}) {
      GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.one.workspace), "workspace");
      LoraGroupedBackward g{};
      static_cast<LoraGroupedOperands&>(g) = operands(workspace.data());
      g.dy = dy_.data(), g.dy_pitch = dy_.pitch(), g.s = s_.data();
      g.dx = p.one.need_dx ? dx.data() : nullptr;
      g.gradients = {to->parameters(), to->list()}, g.gradients.pool.entries = nullptr;
      g.need_da = p.one.need_dlora_a, g.need_db = p.one.need_dlora_b;
      emulator::Stream stream;
      grouped_backward<T>(stream, plan, g);
      kernels::run_timed(stream);
    }
    if (!gradients.same_bits(again)) return "a second run gives other bits of the gradients";

    std::vector<std::vector<Value>> t(m_), scaled(m_);
    for (int row = 0; row < m_; ++row)
      for (int r = 0; r < rank_of_row(row); ++r) {
        t[row].push_back(ds(row, r));
        scaled[row].push_back(halves(shrunk(row, r), scalings_[rows_.adapter_of[row]]));
      }
    for (int row = 0; row < m_ && p.one.need_dx; ++row) {
      for (int j = 0; j < k_; ++j) {
        Value sum;
        for (int l = 0; l < n_ && !plan.one.hybrid; ++l)
          sum.add({dy_.matrix(row, l)}, {w_.matrix(l, j)});
        for (size_t r = 0; r < t[row].size(); ++r) {
          Value a = factor(factors_.a(rows_.adapter_of[row], static_cast<int>(r), j));
          a.value *= mask(row, j), a.error *= mask(row, j);
          sum.add(t[row][r], a);
        }
        const std::string difference =
            compare("dx", row, j, dx[static_cast<size_t>(row) * k_ + j], sum.sum());
        if (!difference.empty()) return difference;
      }
    }
    const auto gradient = [&](int adapter, const auto& term) {
      Value sum;
      for (int row = 0; row < m_; ++row)
        if (rows_.adapter_of[row] == adapter) term(sum, row);
      const Value all = sum.sum();
      Bounded bounded;
      bounded.value = all.value, bounded.magnitude = all.error * 0x1p23, bounded.terms = -1;
      return bounded;
    };
    const std::string difference =
        gradients.compare_a(p.one.need_dlora_a, exact(), [&](int g, int r, int column) {
          return gradient(g, [&](Value& sum, int row) { sum.add(t[row][r], x(row, column)); });
        });
    if (!difference.empty()) return difference;
    return gradients.compare_b(p.one.need_dlora_b, exact(), [&](int g, int r, int column) {
      return gradient(
          g, [&](Value& sum, int row) { sum.add(scaled[row][r], {dy_.matrix(row, column)}); });
    });
  }

  void tell_plan(const std::string& direction, const plan::GroupedPlan& plan) const {
    kernels::tell(direction + (plan.one.is_decode() ? ", decode"
                               : plan.one.hybrid    ? ", hybrid"
                                                    : ", kernels"));
    if (plan.entries != plan::kNone) kernels::tell(direction + ", a list");
  }

  std::mt19937_64 random_;
  const int m_, n_, k_, groups_;
  kernels::GroupedRows rows_;
  const Numbers numbers_;
  const bool dropout_;
  const plan::Card card_;
  const plan::Choice choice_;
  const kernels::GroupedFactors<F> factors_;
  const kernels::Operand<T, Alignment::kVector> x_, w_, dy_, base_;
  const kernels::Matrix<T> bias_;
  const GlobalBuffer<T> bias_buffer_;
  const kernels::RandomMask mask_;
  const GlobalBuffer<int> ranks_;
  std::vector<float> scalings_;
  std::unique_ptr<GlobalBuffer<float>> scaling_;
  GlobalBuffer<float> s_;
};

template <class T, class F>
std::string run_variant(const Case& run) {
  uint32_t& resident = emulator::config().resident_clusters;
  if (resident == 0) resident = 24;
  return GroupedTest<T, F>(run).run();
}

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  using namespace lora_ext::kernel;
  return kernels::variants_main(argc, argv, "lora_grouped_sequence",
                                {{"even", 128, 136, 72},
                                 {"odd", 131, 77, 99},
                                 {"tall", 300, 24, 40},
                                 {"long", 600, 16, 24},
                                 {"wide", 20, 264, 200},
                                 {"many", 40, 24, 32},
                                 {"tiny", 1, 1, 5}},
                                {{"bf16", run_variant<__nv_bfloat16, __nv_bfloat16>},
                                 {"fp16", run_variant<__half, __half>},
                                 {"float_bf16", run_variant<__nv_bfloat16, float>},
                                 {"float_fp16", run_variant<__half, float>}});
}
