// Runs the whole LoRA linear, forward and backward, as the planner decides for a card: every route
// through the kernels, in one workspace of exactly the planned size.
//
// A bound follows each value: `error` is what representations and float sums may add to it.
#include "emulator/kernels/lora_linear_sequence.h"

#include "emulator/kernels/neighbours.h"
#include "emulator/kernels/operand.h"
#include "emulator/machine/config.h"
#include "emulator/specimens/driver.h"

namespace kernels {

extern NEIGHBOUR_COPY(__nv_bfloat16);
extern NEIGHBOUR_COPY(__half);

}  // namespace kernels

namespace lora_ext::kernel {
namespace {

using emulator::GlobalBuffer;
using kernels::RandomMask;
using specimens::Case;
using specimens::Numbers;

// 108 SMs make short splits, two make whole walks; sm_86 has less shared memory.
const plan::Card kCards[] = {{80, 108, 167936, 166912},
                             {80, 2, 167936, 166912},
                             {86, 16, 102400, 101376},
                             {90, 132, 233472, 232448},
                             {90, 4, 233472, 232448}};

// float64 values with their errors, row-major.
struct Values {
  int rows, columns;
  std::vector<double> value, error, magnitude;
  Values(int rows_, int columns_)
      : rows(rows_), columns(columns_), value(size()), error(size()), magnitude(size()) {}
  size_t size() const { return static_cast<size_t>(rows) * columns; }
  size_t at(int i, int j) const { return static_cast<size_t>(i) * columns + j; }
};

template <class V>
Values values_of(const specimens::Matrix<V>& matrix) {
  Values out(matrix.rows, matrix.columns);
  for (int i = 0; i < matrix.rows; ++i)
    for (int j = 0; j < matrix.columns; ++j) {
      out.value[out.at(i, j)] = matrix(i, j);
      out.magnitude[out.at(i, j)] = std::fabs(matrix(i, j));
    }
  return out;
}

// What a float becomes as one half or two.
template <class T>
void represent(Values& values, bool two) {
  const double unit = specimens::rounding_unit<T>();
  const double relative = two ? unit * unit + 0x1p-23 : unit + 0x1p-23;
  const double floor = 0x1p-25 / (two ? kLoScale<T> : 1.f);
  for (size_t i = 0; i < values.size(); ++i)
    values.error[i] += relative * (std::fabs(values.value[i]) + values.error[i]) + floor;
}

// scale * left right^T along `depth`, with get(matrix, outer, inner) picking elements.
template <class Left, class Right>
Values product(int rows, int columns, int depth, double scale, const Values& left, Left left_at,
               const Values& right, Right right_at) {
  Values out(rows, columns);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      double value = 0, error = 0, magnitude = 0;
      for (int l = 0; l < depth; ++l) {
        const size_t a = left_at(i, l), b = right_at(j, l);
        value += left.value[a] * right.value[b];
        magnitude += std::fabs(left.value[a] * right.value[b]);
        error += left.error[a] * (std::fabs(right.value[b]) + right.error[b]) +
                 std::fabs(left.value[a]) * right.error[b];
      }
      const size_t at = out.at(i, j);
      out.value[at] = scale * value;
      out.magnitude[at] = scale * magnitude;
      out.error[at] = std::fabs(scale) * (error + (depth + 8) * 3 * 0x1p-23 * (magnitude + error));
    }
  }
  return out;
}

// An operand in T or float, at any stride and offset.
template <class T>
struct Stored {
  specimens::Matrix<float> exact;  // what is stored
  bool in_float;
  int64_t row_stride, column_stride;
  int offset;
  GlobalBuffer<float> floats;
  GlobalBuffer<T> halves;

  Stored(int rows, int columns, bool in_float_, bool transposed, bool aligned, Numbers numbers,
         double size, std::mt19937_64& random, const char* name)
      : exact(specimens::random_matrix<float>(rows, columns, columns, numbers, random)),
        in_float(in_float_),
        row_stride(transposed ? 1
                   : aligned  ? specimens::padded(columns)
                              : columns + 3),
        column_stride(transposed ? rows : 1),
        offset(aligned ? 0 : 1),
        floats(in_float ? extent(rows, columns) : 0, name),
        halves(in_float ? 0 : extent(rows, columns), name) {
    if (in_float) {
      floats.fill(NAN);
    } else {
      halves.fill(specimens::from_double<T>(NAN));
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        float& value = exact.at(i, j);
        if (numbers == Numbers::Reals) value *= static_cast<float>(size);
        const size_t at = static_cast<size_t>(offset + i * row_stride + j * column_stride);
        if (in_float) {
          floats[at] = value;
        } else {
          halves[at] = specimens::from_double<T>(value);
          value = static_cast<float>(specimens::to_double(halves[at]));
        }
      }
    }
  }
  size_t extent(int rows, int columns) const {
    return static_cast<size_t>(offset + (rows - 1) * row_stride + (columns - 1) * column_stride +
                               1);
  }
  const void* data() const {
    return in_float ? static_cast<const void*>(floats.data() + offset)
                    : static_cast<const void*>(halves.data() + offset);
  }
  Matrix matrix() const { return {data(), row_stride, column_stride}; }
  bool aligned() const {  // as kernels ask for it
    return column_stride == 1 && row_stride % 8 == 0 && offset == 0;
  }
};

template <class Got>
std::string compare(const char* name, const Values& expected, const Got& got, double unit,
                    bool exact) {
  for (int i = 0; i < expected.rows; ++i) {
    for (int j = 0; j < expected.columns; ++j) {
      const double value = expected.value[expected.at(i, j)];
      const double error = expected.error[expected.at(i, j)];
      const double tolerance = exact ? 0 : error + unit * (std::fabs(value) + error) + 0x1p-25;
      const std::string difference =
          specimens::compare(name, i, j, got(expected.at(i, j)), value, tolerance);
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

// |got - expected| / |expected|, both as vectors.
template <class Got>
double relative_error(const Values& expected, const Got& got) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(got(i) - expected.value[i], 2);
    size += std::pow(expected.value[i], 2);
  }
  return size == 0 ? 0 : std::sqrt(difference / size);
}

template <class T>
class LinearTest {
 public:
  explicit LinearTest(const Case& run)
      : random_(run.seed), m_(run.size.m), n_(run.size.n), k_(run.size.k) {
    const bool every_rank = std::string(run.size.name) == "every_rank";
    numbers_ = every_rank || random_() % 2 ? Numbers::Integers : Numbers::Reals;
    constexpr int kRanks[] = {1, 3, 8, 12, 16, 24, 40, 64, 130};
    rank_ = every_rank ? 1 + static_cast<int>((run.seed - 1) % 257)
                       : kRanks[random_() % std::size(kRanks)];
    // Sums of integers are exact where S has two halves.
    float_adapters_ = numbers_ == Numbers::Integers || random_() % 2;
    dropout_ = random_() % 2;
    aligned_ = random_() % 3 != 0;
    card_ = kCards[random_() % std::size(kCards)];
    choice_ = random_() % 2 ? plan::Choice::kKernel : plan::Choice::kHybrid;
    early_ = random_() % 2;
    if (std::string(run.size.name) == "early") {  // kernels that begin early, which are rare else
      aligned_ = early_ = true, choice_ = plan::Choice::kKernel;
      card_ = kCards[std::size(kCards) - 1 - random_() % 2];
    }
    scaling_ = numbers_ == Numbers::Integers ? 0.5f : random_() % 2 ? 1.7f : 0.013f;
    mask_ = std::make_unique<RandomMask>(numbers_, random_);
    // Adapters of a fresh layer, and gradients, are small.
    x_ = stored(m_, k_, false, false, 1, "x"), w_ = stored(n_, k_, false, false, 1, "weight");
    a_ = stored(rank_, k_, float_adapters_, random_() % 4 == 0, 0.02, "lora_a");
    b_ = stored(n_, rank_, float_adapters_, random_() % 4 == 0, 0.001, "lora_b");
    dy_ = stored(m_, n_, false, false, 0.01, "grad");
  }

  std::string run() {
    const std::string difference = forward_pass();
    return difference.empty() ? backward_pass() : difference;
  }

 private:
  std::unique_ptr<Stored<T>> stored(int rows, int columns, bool in_float, bool transposed,
                                    double size, const char* name) {
    return std::make_unique<Stored<T>>(rows, columns, in_float, transposed, aligned_, numbers_,
                                       size, random_, name);
  }

  plan::Problem problem() const {
    plan::Problem p{.m = m_, .n = n_, .k = k_, .rank = rank_};
    p.float_adapters = float_adapters_, p.dropout = dropout_;
    p.aligned_a = a_->aligned(), p.aligned_b = b_->aligned();
    return p;
  }

  // Any of the card's tiles, or the planner's.
  plan::Request request(bool backward) {
    plan::Request asked{choice_};
    asked.early_launch = early_;
    const auto tiles = plan::tiles_of(card_, {backward, float_adapters_, dropout_});
    if (random_() % 3 != 0) asked.tile = tiles[random_() % tiles.size()];
    return asked;
  }

  LoraLinearOperands operands(unsigned char* workspace) const {
    LoraLinearOperands o{};
    o.m = m_, o.n = n_, o.k = k_, o.rank = rank_;
    o.x = x_->data(), o.weight = w_->data();
    o.x_pitch = x_->row_stride, o.weight_pitch = w_->row_stride;
    o.a = a_->matrix(), o.b = b_->matrix(), o.float_adapters = float_adapters_;
    o.scaling = scaling_, o.dropout = dropout_, o.mask = mask_->parameters();
    if (!dropout_) o.mask.keep_scale = 1;
    o.workspace = workspace;
    return o;
  }

  double mask(int row, int column) const { return dropout_ ? mask_->factor(row, column) : 1; }
  bool exact() const { return numbers_ == Numbers::Integers; }
  double unit() const { return specimens::rounding_unit<T>(); }
  double adapter_unit() const { return float_adapters_ ? 0x1p-24 : unit(); }

  // A, B as the kernels have them, and drop(X).
  Values adapter(const Stored<T>& stored) const {
    Values out = values_of(stored.exact);
    if (float_adapters_) represent<T>(out, true);
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
    for (size_t i = 0; i < s.size(); ++i) s.value[i] *= scaling_, s.error[i] *= scaling_;
    represent<T>(s, float_adapters_);
    return s;
  }

  std::string forward_pass() {
    plan::Problem p = problem();
    p.aligned = x_->aligned() && w_->aligned() && n_ % 8 == 0;
    const plan::Plan plan = plan::forward(card_, p, request(false));
    if (!plan.kernel) return "no kernel: " + plan.reason;
    GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace), "workspace");
    GlobalBuffer<T> y(static_cast<size_t>(m_) * n_, "y");
    s_ = std::make_unique<GlobalBuffer<float>>(static_cast<size_t>(m_) * rank_, "s");
    const bool with_bias = random_() % 2, float_bias = random_() % 2;
    const auto bias = stored(1, n_, float_bias, false, 1, "bias");

    LoraLinearForward f{};
    static_cast<LoraLinearOperands&>(f) = operands(workspace.data());
    f.bias = with_bias ? bias->data() : nullptr, f.float_bias = float_bias;
    f.y = y.data(), f.s = s_->data();
    const Values x = values_of(x_->exact), w = values_of(w_->exact);
    Values out = product(
        m_, n_, k_, 1, x, [&](int i, int l) { return x.at(i, l); }, w,
        [&](int j, int l) { return w.at(j, l); });
    if (plan.hybrid) out = Values(m_, n_);  // which is the library's
    for (int i = 0; with_bias && i < m_; ++i)
      for (int j = 0; j < n_; ++j) out.value[out.at(i, j)] += bias->exact(0, j);
    emulator::Stream stream;
    forward<T>(stream, plan, f);
    specimens::run_timed(stream);

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
        "y", rounded(out), [&](size_t at) { return specimens::to_double(y[at]); }, unit(), exact());
  }

  // Integers: the one value that rounding may leave.
  Values rounded(Values values) const {
    if (exact())
      for (double& value : values.value)
        value = specimens::to_double(specimens::from_double<T>(value));
    return values;
  }

  std::string backward_pass() {
    plan::Problem p = problem();
    p.aligned = dy_->aligned() && w_->aligned() && x_->aligned() && k_ % 8 == 0;
    const int wanted = 1 + static_cast<int>(random_() % 7);
    const int needs = random_() % 2 ? 7 : wanted;
    p.need_dx = needs & 1, p.need_dlora_a = needs & 2, p.need_dlora_b = needs & 4;
    const plan::Plan plan = plan::backward(card_, p, request(true));
    if (!plan.kernel) return "no kernel: " + plan.reason;
    GlobalBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace), "workspace");
    GlobalBuffer<T> dx(static_cast<size_t>(p.need_dx ? m_ : 0) * k_, "dx");
    Adapter da(p.need_dlora_a ? rank_ * k_ : 0, float_adapters_, "dlora_a");
    Adapter db(p.need_dlora_b ? n_ * rank_ : 0, float_adapters_, "dlora_b");

    LoraLinearBackward g{};
    static_cast<LoraLinearOperands&>(g) = operands(workspace.data());
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
    // A workspace that was used before, and a grid that reads dX after the call.
    emulator::Stream stream;
    for (int calls = random_() % 4 == 0 ? 2 : 1; calls > 0; --calls) {
      const int early = backward<T>(stream, plan, g);
      if (early != plan.gemm.early + plan.early_wgrad)
        return emulator::format("%d kernels were launched to begin early", early);
    }
    GlobalBuffer<T> dx_after(dx.size(), "dx after the call");
    stream.launch({.grid = dim3(2), .block = dim3(64)}, kernels::copy<T>,
                  static_cast<const T*>(dx.data()), dx_after.data(), static_cast<int>(dx.size()));
    specimens::run_timed(stream);

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
          "dx", rounded(out), [&](size_t at) { return specimens::to_double(dx_after[at]); }, unit(),
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
      return in_float ? floats[at] : specimens::to_double(halves[at]);
    }
  };

  // `t` is the factor whose halves cannot go below float16's smallest number: 2^-36 an element.
  std::string compare_adapter(const char* name, const Values& expected, const Adapter& got,
                              const Values& t) const {
    const std::string difference = compare(name, expected, got, adapter_unit(), exact());
    if (!difference.empty()) return difference;
    double squares = 0;
    for (const double value : t.value) squares += value * value;
    const double rms = std::sqrt(squares / static_cast<double>(t.size()));
    const double allowed =
        1e-5 + (std::is_same_v<T, __half> && rms > 0 ? 0x1p-25 / kLoScale<T> / rms : 0);
    const double relative = relative_error(expected, got);
    if (float_adapters_ && relative > allowed)
      return emulator::format("%s: relative error %.3g, above %.3g", name, relative, allowed);
    return "";
  }

  std::mt19937_64 random_;
  int m_, n_, k_, rank_;
  Numbers numbers_;
  bool float_adapters_, dropout_, aligned_, early_;
  plan::Card card_;
  plan::Choice choice_;
  float scaling_;
  std::unique_ptr<RandomMask> mask_;
  std::unique_ptr<Stored<T>> x_, w_, a_, b_, dy_;
  std::unique_ptr<GlobalBuffer<float>> s_;
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
  return specimens::specimen_main(argc, argv,
                                  {.name = "lora_linear_sequence",
                                   .sizes = {{"even", 128, 256, 128},
                                             {"odd", 131, 277, 99},
                                             {"tall", 300, 64, 72},
                                             {"wide", 40, 520, 130},
                                             {"early", 300, 264, 136},
                                             {"tiny", 3, 1, 5},
                                             {"every_rank", 33, 40, 72}},
                                   .variants = {"bf16", "fp16"},
                                   .run = lora_ext::kernel::run_variant,
                                   .flops = specimens::gemm_flops});
}
