// Runs the whole LoRA linear, forward and backward, as the planner decides for a card: every route
// through the kernels, in one workspace of exactly the planned size, which other calls may have
// used. X and dY are written by a kernel before, and dX is read by one after.
//
// Each run reports which plans it ran, so that the tests can count them.
#include "emulated/kernels/lora_linear_sequence.h"

#include "emulated/kernels/float64_values.h"
#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/operand.h"
#include "emulated/kernels/plan_facts.h"
#include "emulated/kernels/stored_operand.h"

namespace kernels {
namespace {

template <class T>
class LinearTest {
 public:
  explicit LinearTest(const Case& run) : random_(run.seed), case_(draw_linear_case(run, random_)) {}

  void run() {
    // Other plans may use the workspace before.
    for (int passes = random_() % 6 == 0 ? 2 : 1; passes > 0; --passes) forward_pass();
    backward_pass();
  }

 private:
  Stored<T> stored(int rows, int columns, bool in_float, bool transposed, double size,
                   const char* name) {
    return Stored<T>(rows, columns, in_float, transposed, case_.aligned, case_.numbers, size,
                     random_, name);
  }
  Stored<T> adapter(int rows, int columns, double size, const char* name) {
    return stored(rows, columns, case_.float_adapters, random_() % 4 == 0, size, name);
  }

  plan::Problem problem() const {
    plan::Problem p{.m = m_, .n = n_, .k = k_, .rank = rank_};
    p.float_adapters = case_.float_adapters, p.dropout = case_.dropout;
    p.aligned_a = a_.aligned(), p.aligned_b = b_.aligned();
    p.factor_rows = a_.column_stride == 1 && b_.column_stride == 1;
    return p;
  }

  // Any of the card's tiles, or the planner's.
  plan::Request request(bool backward) {
    plan::Request asked{case_.choice};
    asked.use_pdl = case_.early;
    const plan::Call call{backward, case_.float_adapters, case_.dropout};
    auto tiles = plan::tiles_of(case_.card, call);
    std::erase(tiles, plan::Tile::kDecode);  // which few rows take if no tile is requested
    if (random_() % 3 != 0) asked.tile = tiles[random_() % tiles.size()];
    return asked;
  }

  LoraLinearOperands operands(unsigned char* workspace) const {
    LoraLinearOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rank = rank_;
    o.x = x_.data(), o.weight = w_.data();
    o.x_pitch = x_.row_stride, o.weight_pitch = w_.row_stride;
    o.a = a_.matrix(), o.b = b_.matrix(), o.float_adapters = case_.float_adapters;
    o.scaling = case_.scaling, o.dropout = case_.dropout, o.mask = mask_.parameters();
    if (!case_.dropout) o.mask.keep_scale = 1;
    o.workspace = workspace;
    return o;
  }

  double mask(int row, int column) const { return case_.dropout ? mask_.factor(row, column) : 1; }
  bool exact() const { return case_.exact(); }
  double unit() const { return rounding_unit<T>(); }
  double adapter_unit() const { return case_.float_adapters ? 0x1p-24 : unit(); }

  // A, B as the kernels have them, and drop(X).
  Values adapter(const Stored<T>& stored) const {
    return Values(stored.exact).each([&](Value& to, int, int) {
      if (case_.float_adapters) to = as_half<T>(to, true);
    });
  }
  Values dropped() const {
    return Values(x_.exact).each([&](Value& to, int i, int j) { to = to.times(mask(i, j)); });
  }
  // S, unscaled.
  Values shrunk() const { return product(dropped(), adapter(a_)); }
  Values halves(Values s) const {
    return s.each([&](Value& to, int, int) {
      to = scaled_halves<T>(to, case_.scaling, case_.float_adapters, exact());
    });
  }

  // A workspace of the planned size: as allocated, or as the call before has left it.
  std::unique_ptr<GlobalBuffer<unsigned char>> workspace_of(const plan::Plan& plan) {
    auto workspace = std::make_unique<GlobalBuffer<unsigned char>>(
        static_cast<size_t>(plan.workspace), "workspace");
    if (!used_workspace_.empty() && random_() % 2) {
      used_workspace_.resize(workspace->size(), emulator::kPoisonByte);
      workspace->fill(0);  // tells the race checker that it is initialised
      std::copy_n(used_workspace_.begin(), workspace->size(), workspace->begin());
    }
    return workspace;
  }

  void forward_pass() {
    plan::Problem p = problem();
    p.aligned = x_.aligned() && w_.aligned() && n_ % 8 == 0;
    std::unique_ptr<Stored<T>> base;
    if (case_.choice == plan::Choice::kHybrid && random_() % 2) {
      base.reset(new Stored<T>(stored(m_, n_, false, false, 1, "base")));
      p.given_base = true, p.aligned = p.aligned && base->aligned();
      tell("forward, onto a base");
    }
    const plan::Plan plan = plan::make_plan(case_.card, p, request(false));
    tell_plan("forward", plan, case_, mask_);
    const auto workspace = workspace_of(plan);
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    s_ = std::make_unique<GlobalBuffer<float>>(static_cast<size_t>(m_) * rank_, "s");
    const bool with_bias = base == nullptr && random_() % 2, float_bias = random_() % 2;
    const auto bias = stored(1, n_, float_bias, false, 1, "bias");

    LoraLinearForward f{};
    static_cast<LoraLinearOperands&>(f) = operands(workspace->data());
    f.bias = with_bias ? bias.data() : nullptr, f.float_bias = float_bias;
    if (base != nullptr) f.base = base->data(), f.base_pitch = base->row_stride;
    f.y = y.data(), f.s = s_->data();
    emulator::Stream stream;
    x_.is_written_on(stream);
    for (int calls = random_() % 4 == 0 ? 2 : 1; calls > 0; --calls)
      forward<T>(stream, plan, f, case_.clusters);
    run_timed(stream);
    used_workspace_ = workspace->to_vector();

    const Values s = shrunk();
    compare("s", s, *s_, 0, exact());
    Values out(m_, n_);
    if (!plan.hybrid() && base == nullptr) out = product(Values(x_.exact), Values(w_.exact));
    out.each([&](Value& to, int i, int j) {
      if (with_bias) to.add({bias.exact(0, j)}, {1});
      if (base != nullptr) to.add({base->exact(i, j)}, {1});
    });
    check_sum("y", std::move(out), product(halves(s), adapter(b_)), y);
  }

  // Checks a product with the weight plus the adapters' part.
  void check_sum(const char* name, Values sum, const Values& low_rank,
                 const GlobalBuffer<T>& got) const {
    sum.each([&](Value& to, int i, int j) {
      const Value& more = low_rank(i, j);
      to.value += more.value;
      to.off += more.off + 3 * 0x1p-23 * (to.magnitude + more.magnitude);
      if (exact()) to = rounded<T>(to);
    });
    compare(name, sum, got, unit(), exact());
  }

  void backward_pass() {
    plan::Problem p = problem();
    p.backward = true;
    p.aligned = dy_.aligned() && w_.aligned() && x_.aligned() && k_ % 8 == 0;
    const int wanted = 1 + static_cast<int>(random_() % 7);
    const int needs = random_() % 2 ? 7 : wanted;
    p.need_dx = needs & 1, p.need_dlora_a = needs & 2, p.need_dlora_b = needs & 4;
    const plan::Plan plan = plan::make_plan(case_.card, p, request(true));
    tell_plan("backward", plan, case_, mask_);
    const auto workspace = workspace_of(plan);
    GlobalBuffer<T> dx(static_cast<size_t>(p.need_dx ? m_ : 0) * k_, "dx");
    FloatOrHalf<T> da(p.need_dlora_a ? rank_ * k_ : 0, case_.float_adapters, "dlora_a");
    FloatOrHalf<T> db(p.need_dlora_b ? n_ * rank_ : 0, case_.float_adapters, "dlora_b");

    LoraLinearBackward g{};
    static_cast<LoraLinearOperands&>(g) = operands(workspace->data());
    g.dy = dy_.data(), g.dy_pitch = dy_.row_stride, g.s = s_->data();
    g.dx = p.need_dx ? dx.data() : nullptr;
    g.da = p.need_dlora_a ? da.data() : nullptr, g.db = p.need_dlora_b ? db.data() : nullptr;
    emulator::Stream stream;
    x_.is_written_on(stream), dy_.is_written_on(stream);
    for (int calls = random_() % 4 == 0 ? 2 : 1; calls > 0; --calls) {
      const int early = backward<T>(stream, plan, g, case_.clusters);
      const plan::Tiled& tiled = *plan.tiled();
      if (early != (tiled.gemm && tiled.gemm->use_pdl) + tiled.wgrad_uses_pdl)
        differ("%d kernels were launched with PDL", early);
    }
    GlobalBuffer<T> dx_after(dx.size(), "dx after the call");
    stream.launch({.grid = dim3(2), .block = dim3(64)}, copy<T>, static_cast<const T*>(dx.data()),
                  dx_after.data(), static_cast<int>(dx.size()));
    run_timed(stream);

    const Values dy(dy_.exact), ds = halves(product(dy, adapter(b_).transposed()));
    if (p.need_dx) {
      Values out(m_, k_);
      if (!plan.hybrid()) out = product(dy, Values(w_.exact).transposed());
      Values low_rank = product(ds, adapter(a_).transposed());
      low_rank.each([&](Value& to, int i, int j) { to = to.times(mask(i, j)); });
      check_sum("dx", std::move(out), low_rank, dx_after);
    }
    if (p.need_dlora_a)
      check_adapter("dlora_a", product(ds.transposed(), dropped().transposed()), da, ds);
    if (p.need_dlora_b) {
      const Values s = halves(shrunk());
      check_adapter("dlora_b", product(dy.transposed(), s.transposed()), db, s);
    }
  }

  // `t` is the factor whose halves cannot go below float16's smallest number: 2^-36 an element.
  void check_adapter(const char* name, Values expected, const FloatOrHalf<T>& got,
                     const Values& t) const {
    if (exact() && !case_.float_adapters)
      expected.each([](Value& to, int, int) { to = rounded<T>(to); });
    compare(name, expected, got, adapter_unit(), exact());
    constexpr int kFewRows = 8;  // their sums cancel too much for a bound of all elements together
    if (!case_.float_adapters || m_ < kFewRows) return;
    double squares = 0;
    for (const Value& each : t.values) squares += each.value * each.value;
    const double rms = std::sqrt(squares / static_cast<double>(t.values.size()));
    const double allowed =
        1e-5 + (std::is_same_v<T, __half> && rms > 0 ? 0x1p-25 / kLoScale<T> / rms : 0);
    const double relative = relative_error(expected, got);
    if (relative > allowed) differ("%s: relative error %.3g, above %.3g", name, relative, allowed);
  }

  Random random_;
  const LinearCase case_;
  const int m_ = case_.m, n_ = case_.n, k_ = case_.k, rank_ = case_.rank;
  const RandomMask mask_{case_.numbers, random_, /*may_be_shard=*/true};
  Stored<T> x_ = stored(m_, k_, false, false, 1, "x");
  const Stored<T> w_ = stored(n_, k_, false, false, 1, "weight");
  const Stored<T> a_ = adapter(rank_, k_, case_.size_of_a, "lora_a");
  const Stored<T> b_ = adapter(n_, rank_, case_.size_of_b, "lora_b");
  Stored<T> dy_ = stored(m_, n_, false, false, case_.size_of_dy, "grad");
  std::unique_ptr<GlobalBuffer<float>> s_;
  std::vector<unsigned char> used_workspace_;
};

template <class T>
void run_variant(const Case& run) {
  limit_residency();
  LinearTest<T>(run).run();
}

}  // namespace

const Program program{"lora_linear_sequence",
                      {{"bf16", run_variant<__nv_bfloat16>}, {"fp16", run_variant<__half>}},
                      {{"even", 128, 256, 128},
                       {"odd", 131, 277, 99},
                       {"tall", 300, 64, 72},
                       {"wide", 40, 520, 130},
                       {"early", 300, 264, 136},
                       {"laps", 300, 584, 648},
                       {"tiny", 3, 1, 5},
                       {"every_rank", 33, 40, 72}}};

}  // namespace kernels
