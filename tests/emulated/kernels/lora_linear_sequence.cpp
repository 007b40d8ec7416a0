// Runs the whole LoRA linear, forward and backward, as the planner decides for a card: every route
// through the kernels, in one workspace of exactly the planned size, which other calls may have
// used. X and dY are written by a kernel before, and dX is read by one after.
//
// A run tells which plans it ran, so that the tests can count them.
#include "emulated/kernels/lora_linear_sequence.h"

#include "emulated/kernels/float64_values.h"
#include "emulated/kernels/linear_case.h"
#include "emulated/kernels/operand.h"
#include "emulated/kernels/plan_facts.h"
#include "emulated/kernels/stored_operand.h"
#include "emulator/machine/config.h"

namespace lora_ext::kernel {
namespace {

using emulator::GlobalBuffer;
using kernels::Case;
using kernels::LinearCase;
using kernels::product;
using kernels::RandomMask;
using kernels::represent;
using kernels::Stored;
using kernels::Values;
using kernels::values_of;

template <class T>
class LinearTest {
 public:
  explicit LinearTest(const Case& run)
      : random_(run.seed), case_(kernels::draw_linear_case(run, random_)) {
    const auto adapter = [&](int rows, int columns, double size, const char* name) {
      return stored(rows, columns, case_.float_adapters, random_() % 4 == 0, size, name);
    };
    mask_ = std::make_unique<RandomMask>(case_.numbers, random_, /*may_be_shard=*/true);
    x_ = stored(m_, k_, false, false, 1, "x"), w_ = stored(n_, k_, false, false, 1, "weight");
    a_ = adapter(rank_, k_, case_.size_of_a, "lora_a");
    b_ = adapter(n_, rank_, case_.size_of_b, "lora_b");
    dy_ = stored(m_, n_, false, false, case_.size_of_dy, "grad");
  }

  std::string run() {
    std::string difference;
    // Other plans leave their workspace to the next.
    for (int passes = random_() % 6 == 0 ? 2 : 1; passes > 0 && difference.empty(); --passes)
      difference = forward_pass();
    return difference.empty() ? backward_pass() : difference;
  }

 private:
  std::unique_ptr<Stored<T>> stored(int rows, int columns, bool in_float, bool transposed,
                                    double size, const char* name) {
    return std::make_unique<Stored<T>>(rows, columns, in_float, transposed, case_.aligned,
                                       case_.numbers, size, random_, name);
  }

  plan::Problem problem() const {
    plan::Problem p{.m = m_, .n = n_, .k = k_, .rank = rank_};
    p.float_adapters = case_.float_adapters, p.dropout = case_.dropout;
    p.aligned_a = a_->aligned(), p.aligned_b = b_->aligned();
    p.factor_rows = a_->column_stride == 1 && b_->column_stride == 1;
    return p;
  }

  // Any of the card's tiles, or the planner's. What may be made in the grid mostly is.
  plan::Request request(bool backward) {
    plan::Request asked{case_.choice};
    asked.early_launch = case_.early;
    const plan::Call call{backward, case_.float_adapters, case_.dropout};
    auto tiles = plan::tiles_of(case_.card, call);
    std::erase(tiles, plan::Tile::kDecode);  // which few rows take where no tile is asked for
    if (random_() % 3 != 0) asked.tile = tiles[random_() % tiles.size()];
    const auto in_grid = [](plan::Tile tile) { return plan::facts_of(tile).in_grid; };
    const auto first = std::find_if(tiles.begin(), tiles.end(), in_grid);
    if (case_.wants_in_grid && first != tiles.end() && random_() % 4 != 0) asked.tile = *first;
    return asked;
  }

  LoraLinearOperands operands(unsigned char* workspace) const {
    LoraLinearOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rank = rank_;
    o.x = x_->data(), o.weight = w_->data();
    o.x_pitch = x_->row_stride, o.weight_pitch = w_->row_stride;
    o.a = a_->matrix(), o.b = b_->matrix(), o.float_adapters = case_.float_adapters;
    o.scaling = case_.scaling, o.dropout = case_.dropout, o.mask = mask_->parameters();
    if (!case_.dropout) o.mask.keep_scale = 1;
    o.workspace = workspace;
    return o;
  }

  double mask(int row, int column) const { return case_.dropout ? mask_->factor(row, column) : 1; }
  bool exact() const { return case_.exact(); }
  double unit() const { return kernels::rounding_unit<T>(); }
  double adapter_unit() const { return case_.float_adapters ? 0x1p-24 : unit(); }

  // A, B as the kernels have them, and drop(X).
  Values adapter(const Stored<T>& stored) const {
    Values out = values_of(stored.exact);
    if (case_.float_adapters) represent<T>(out, true);
    return out;
  }
  Values dropped() const {
    Values out = values_of(x_->exact);
    for (int i = 0; i < m_; ++i)
      for (int j = 0; j < k_; ++j) out.value[out.at(i, j)] *= mask(i, j);
    return out;
  }
  // S, unscaled.
  Values shrunk() const {
    const Values x = dropped(), a = adapter(*a_);
    return product(
        m_, rank_, k_, 1, x, [&](int i, int l) { return x.at(i, l); }, a,
        [&](int j, int l) { return a.at(j, l); });
  }
  Values scaled_halves(Values s) const {
    for (size_t i = 0; i < s.size(); ++i) s.value[i] *= case_.scaling, s.error[i] *= case_.scaling;
    if (exact() && !case_.float_adapters) return rounded(s);
    represent<T>(s, case_.float_adapters);
    return s;
  }

  // Of the planned size: as it is allocated, or as the call before has left it.
  std::unique_ptr<GlobalBuffer<unsigned char>> workspace_of(const plan::Plan& plan) {
    auto workspace = std::make_unique<GlobalBuffer<unsigned char>>(
        static_cast<size_t>(plan.workspace), "workspace");
    if (!used_workspace_.empty() && random_() % 2) {
      used_workspace_.resize(workspace->size(), emulator::kPoisonByte);
      workspace->fill(0);  // tells the race checker that it is initialised
      std::copy_n(used_workspace_.begin(), workspace->size(), workspace->begin());
      if (plan.in_grid()) kernels::tell("in grid, in a used workspace");
    }
    return workspace;
  }

  std::string forward_pass() {
    plan::Problem p = problem();
    p.aligned = x_->aligned() && w_->aligned() && n_ % 8 == 0;
    std::unique_ptr<Stored<T>> base;
    if (case_.choice == plan::Choice::kHybrid && random_() % 2) {
      base = stored(m_, n_, false, false, 1, "base");
      p.given_base = true, p.aligned = p.aligned && base->aligned();
      kernels::tell("forward, onto a base");
    }
    const plan::Plan plan = plan::forward(case_.card, p, request(false));
    const std::string unfit = kernels::tell_plan("forward", plan, case_, *mask_);
    if (!unfit.empty()) return unfit;
    const auto workspace = workspace_of(plan);
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    s_ = std::make_unique<GlobalBuffer<float>>(static_cast<size_t>(m_) * rank_, "s");
    const bool with_bias = base == nullptr && random_() % 2, float_bias = random_() % 2;
    const auto bias = stored(1, n_, float_bias, false, 1, "bias");

    LoraLinearForward f{};
    static_cast<LoraLinearOperands&>(f) = operands(workspace->data());
    f.bias = with_bias ? bias->data() : nullptr, f.float_bias = float_bias;
    if (base != nullptr) f.base = base->data(), f.base_pitch = base->row_stride;
    f.y = y.data(), f.s = s_->data();
    const Values x = values_of(x_->exact), w = values_of(w_->exact);
    Values out = product(
        m_, n_, k_, 1, x, [&](int i, int l) { return x.at(i, l); }, w,
        [&](int j, int l) { return w.at(j, l); });
    if (plan.hybrid) out = Values(m_, n_);  // which is the library's
    for (int i = 0; with_bias && i < m_; ++i)
      for (int j = 0; j < n_; ++j) out.value[out.at(i, j)] += bias->exact(0, j);
    for (int i = 0; base != nullptr && i < m_; ++i)
      for (int j = 0; j < n_; ++j) out.value[out.at(i, j)] = base->exact(i, j);
    for (size_t at = 0; base != nullptr && at < out.size(); ++at)
      out.magnitude[at] = std::fabs(out.value[at]);
    emulator::Stream stream;
    x_->is_written_on(stream);
    for (int calls = random_() % 4 == 0 ? 2 : 1; calls > 0; --calls)
      forward<T>(stream, plan, f, case_.clusters);
    kernels::run_timed(stream);
    used_workspace_ = workspace->to_vector();

    const Values s = shrunk(), t = scaled_halves(s), b = adapter(*b_);
    std::string difference = compare("s", s, [&](size_t at) { return (*s_)[at]; }, 0, exact());
    if (!difference.empty()) return difference;
    Values low_rank = product(
        m_, n_, rank_, 1, t, [&](int i, int l) { return t.at(i, l); }, b,
        [&](int j, int l) { return b.at(j, l); });
    for (size_t at = 0; at < out.size(); ++at) {
      out.value[at] += low_rank.value[at];
      out.error[at] += low_rank.error[at] + 3 * 0x1p-23 * (out.magnitude[at] + 1);
    }
    return compare(
        "y", rounded(out), [&](size_t at) { return kernels::to_double(y[at]); }, unit(), exact());
  }

  // Integers: the one value that rounding may leave.
  Values rounded(Values values) const {
    if (exact())
      for (double& value : values.value) value = kernels::to_double(kernels::from_double<T>(value));
    return values;
  }

  std::string backward_pass() {
    plan::Problem p = problem();
    p.aligned = dy_->aligned() && w_->aligned() && x_->aligned() && k_ % 8 == 0;
    const int wanted = 1 + static_cast<int>(random_() % 7);
    const int needs = random_() % 2 ? 7 : wanted;
    p.need_dx = case_.wants_in_grid || (needs & 1), p.need_dlora_a = needs & 2,
    p.need_dlora_b = needs & 4;
    const plan::Plan plan = plan::backward(case_.card, p, request(true));
    const std::string unfit = kernels::tell_plan("backward", plan, case_, *mask_);
    if (!unfit.empty()) return unfit;
    const auto workspace = workspace_of(plan);
    GlobalBuffer<T> dx(static_cast<size_t>(p.need_dx ? m_ : 0) * k_, "dx");
    Adapter da(p.need_dlora_a ? rank_ * k_ : 0, case_.float_adapters, "dlora_a");
    Adapter db(p.need_dlora_b ? n_ * rank_ : 0, case_.float_adapters, "dlora_b");

    LoraLinearBackward g{};
    static_cast<LoraLinearOperands&>(g) = operands(workspace->data());
    g.dy = dy_->data(), g.dy_pitch = dy_->row_stride, g.s = s_->data();
    g.dx = p.need_dx ? dx.data() : nullptr;
    const Values dy = values_of(dy_->exact), w = values_of(w_->exact);
    Values base(0, 0);
    if (p.need_dx) {
      base = product(
          m_, k_, n_, 1, dy, [&](int i, int l) { return dy.at(i, l); }, w,
          [&](int j, int l) { return w.at(l, j); });
      if (plan.hybrid) base = Values(m_, k_);
    }
    g.da = p.need_dlora_a ? da.data() : nullptr, g.db = p.need_dlora_b ? db.data() : nullptr;
    emulator::Stream stream;
    x_->is_written_on(stream), dy_->is_written_on(stream);
    for (int calls = random_() % 4 == 0 ? 2 : 1; calls > 0; --calls) {
      const int early = backward<T>(stream, plan, g, case_.clusters);
      if (early != plan.gemm.early + plan.early_wgrad)
        return emulator::format("%d kernels were launched to begin early", early);
    }
    GlobalBuffer<T> dx_after(dx.size(), "dx after the call");
    stream.launch({.grid = dim3(2), .block = dim3(64)}, kernels::copy<T>,
                  static_cast<const T*>(dx.data()), dx_after.data(), static_cast<int>(dx.size()));
    kernels::run_timed(stream);

    const Values b = adapter(*b_);
    const Values ds = scaled_halves(product(
        m_, rank_, n_, 1, dy, [&](int i, int l) { return dy.at(i, l); }, b,
        [&](int j, int l) { return b.at(l, j); }));
    std::string difference;
    if (p.need_dx) {
      const Values a = adapter(*a_);
      Values low_rank = product(
          m_, k_, rank_, 1, ds, [&](int i, int l) { return ds.at(i, l); }, a,
          [&](int j, int l) { return a.at(l, j); });
      for (int i = 0; i < m_; ++i) {
        for (int j = 0; j < k_; ++j) {
          const size_t at = low_rank.at(i, j);
          low_rank.value[at] *= mask(i, j), low_rank.error[at] *= mask(i, j);
          low_rank.magnitude[at] *= mask(i, j);
        }
      }
      Values& out = base;
      for (size_t at = 0; at < out.size(); ++at) {
        out.value[at] += low_rank.value[at];
        out.error[at] +=
            low_rank.error[at] + 3 * 0x1p-23 * (out.magnitude[at] + low_rank.magnitude[at]);
      }
      difference = compare(
          "dx", rounded(out), [&](size_t at) { return kernels::to_double(dx_after[at]); }, unit(),
          exact());
      if (!difference.empty()) return difference;
    }
    if (p.need_dlora_a) {
      const Values x = dropped();
      const Values out = product(
          rank_, k_, m_, 1, ds, [&](int i, int l) { return ds.at(l, i); }, x,
          [&](int j, int l) { return x.at(l, j); });
      difference = compare_adapter("dlora_a", out, da, ds);
      if (!difference.empty()) return difference;
    }
    if (p.need_dlora_b) {
      const Values s = scaled_halves(shrunk());
      const Values out = product(
          n_, rank_, m_, 1, dy, [&](int i, int l) { return dy.at(l, i); }, s,
          [&](int j, int l) { return s.at(l, j); });
      difference = compare_adapter("dlora_b", out, db, s);
    }
    return difference;
  }

  struct Adapter {
    bool in_float;
    GlobalBuffer<float> floats;
    GlobalBuffer<T> halves;
    Adapter(int size, bool in_float_, const char* name)
        : in_float(in_float_),
          floats(static_cast<size_t>(in_float ? size : 0), name),
          halves(static_cast<size_t>(in_float ? 0 : size), name) {}
    void* data() {
      return in_float ? static_cast<void*>(floats.data()) : static_cast<void*>(halves.data());
    }
    double operator()(size_t at) const {
      return in_float ? floats[at] : kernels::to_double(halves[at]);
    }
  };

  // `t` is the factor whose halves cannot go below float16's smallest number: 2^-36 an element.
  std::string compare_adapter(const char* name, Values expected, const Adapter& got,
                              const Values& t) const {
    if (!case_.float_adapters) expected = rounded(expected);
    const std::string difference = compare(name, expected, got, adapter_unit(), exact());
    if (!difference.empty()) return difference;
    constexpr int kFewRows = 8;  // whose sums cancel too much for a bound of all elements together
    if (!case_.float_adapters || m_ < kFewRows) return "";
    double squares = 0;
    for (const double value : t.value) squares += value * value;
    const double rms = std::sqrt(squares / static_cast<double>(t.size()));
    const double allowed =
        1e-5 + (std::is_same_v<T, __half> && rms > 0 ? 0x1p-25 / kLoScale<T> / rms : 0);
    const double relative = relative_error(expected, got);
    if (relative > allowed)
      return emulator::format("%s: relative error %.3g, above %.3g", name, relative, allowed);
    return "";
  }

  std::mt19937_64 random_;
  const LinearCase case_;
  const int m_ = case_.m, n_ = case_.n, k_ = case_.k, rank_ = case_.rank;
  std::unique_ptr<RandomMask> mask_;
  std::unique_ptr<Stored<T>> x_, w_, a_, b_, dy_;
  std::unique_ptr<GlobalBuffer<float>> s_;
  std::vector<unsigned char> used_workspace_;
};

std::string run_variant(const Case& run) {
  // Of element-wise kernels' hundreds of blocks, not all at a time: a thread has its own stack.
  uint32_t& resident = emulator::config().resident_clusters;
  if (resident == 0) resident = 24;
  return run.variant == "bf16" ? LinearTest<__nv_bfloat16>(run).run()
                               : LinearTest<__half>(run).run();
}

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::program_main(argc, argv,
                               {.name = "lora_linear_sequence",
                                .sizes = {{"even", 128, 256, 128},
                                          {"odd", 131, 277, 99},
                                          {"tall", 300, 64, 72},
                                          {"wide", 40, 520, 130},
                                          {"early", 300, 264, 136},
                                          {"in_grid_deep", 300, 264, 392},
                                          {"in_grid_wide", 520, 392, 136},
                                          {"laps", 300, 584, 648},
                                          {"tiny", 3, 1, 5},
                                          {"every_rank", 33, 40, 72}},
                                .variants = {"bf16", "fp16"},
                                .run = lora_ext::kernel::run_variant,
                                .flops = kernels::gemm_flops});
}
