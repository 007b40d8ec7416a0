// A random problem of lora_gemm, Y = P Q + mask * (T U) + bias, or onto a base, and what Y must be.
#pragma once
#include "emulated/kernels/operand.h"
#include "kernel/halves.h"

namespace kernels {

// kAlignment: of Y and the base.
template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct GemmProblem {
  using Random = std::mt19937_64;
  using Numbers = kernels::Numbers;
  template <class V>
  using Buffer = emulator::GlobalBuffer<V>;
  using Stored = Operand<T, Alignment::kVector>;
  using Base = Operand<T, kAlignment>;
  static constexpr double kBetweenRows = -12345;
  static constexpr int kOffset = Layout<kAlignment>::kOffset;

  const int m, n, k, rank, terms;
  const Numbers numbers;
  const bool with_bias, float_bias, lets_wgrad_begin;
  const Stored p, q;
  std::unique_ptr<Stored> t[3], u[3];
  const kernels::Matrix<T> bias;
  const Buffer<T> bias_buffer;
  const Buffer<float> float_bias_buffer;
  const int y_pitch;
  Buffer<T> y;
  const RandomMask mask;
  std::unique_ptr<Base> base;
  bool in_place = false;  // Y holds the base

  // With k = 0, the low-rank product alone; then p and q have `depth`.
  GemmProblem(int m_, int n_, int depth, int k_, int rank_, Random& random, bool may_have_base)
      : m(m_),
        n(n_),
        k(k_),
        rank(rank_),
        terms(random() % 3 == 0 ? 3 : 1),
        numbers(random() % 2 ? Numbers::Integers : Numbers::Reals),
        with_bias(!kMasked && random() % 4 != 0),
        float_bias(random() % 2),
        lets_wgrad_begin(random() % 4 != 0),
        p(m, depth, numbers, random, "p"),
        q(kMNMajor ? depth : n, kMNMajor ? n : depth, numbers, random, "q"),
        bias(kernels::random_matrix<T>(1, n, n, numbers, random)),
        bias_buffer(bias.values, "bias"),
        float_bias_buffer({bias.values.begin(), bias.values.end()}, "bias in float"),
        y_pitch(Layout<kAlignment>::pitch(n) + 8),
        y(kOffset + static_cast<size_t>(m) * y_pitch, "y"),
        mask(numbers, random) {
    for (int i = 0; i < terms; ++i) {  // of one pitch
      t[i] = std::make_unique<Stored>(m, rank, numbers, random, "t", false);
      u[i] = std::make_unique<Stored>(kMNMajor ? rank : n, kMNMajor ? n : rank, numbers, random,
                                      "u", false);
    }
    y.fill(kernels::from_double<T>(kBetweenRows));
    if (!may_have_base || random() % 2) return;
    base = std::make_unique<Base>(m, n, numbers, random, "base");
    in_place = random() % 2;
    for (int i = 0; in_place && i < m; ++i)
      std::copy_n(&base->matrix.at(i, 0), n,
                  y.begin() + kOffset + static_cast<size_t>(i) * y_pitch);
  }

  lora_ext::kernel::LoraGemmParams<T> params() {
    lora_ext::kernel::LoraGemmParams<T> params{};
    if (k > 0) params.p = p.data(), params.q = q.data();
    params.y = y.data() + kOffset;
    params.p_pitch = p.pitch(), params.q_pitch = q.pitch(), params.y_pitch = y_pitch;
    params.t_pitch = t[0]->pitch(), params.u_pitch = u[0]->pitch();
    for (int i = 0; i < terms; ++i) params.low_rank[i] = {t[i]->data(), u[i]->data()};
    if (with_bias) {
      params.bias = float_bias ? static_cast<const void*>(float_bias_buffer.data())
                               : static_cast<const void*>(bias_buffer.data());
    }
    if (base != nullptr) {
      params.base = in_place ? params.y : base->data();
      params.base_pitch = in_place ? y_pitch : base->pitch();
    }
    params.whole_chunks = kAlignment == Alignment::kVector;
    params.float_bias = float_bias, params.lets_wgrad_begin = lets_wgrad_begin;
    params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = terms;
    params.mask = mask.parameters();
    return params;
  }

  // Y is right, and nothing is written between its rows. "" or what differs.
  std::string check() const {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < y_pitch; ++j) {
        const kernels::Bounded sum = expected(i, j);
        const bool exact = numbers == Numbers::Integers || j >= n;
        const double rounded = kernels::to_double(kernels::from_double<T>(sum.value));
        const double error =
            sum.error() + kernels::rounding_error<T>(std::fabs(sum.value) + sum.error());
        const std::string difference = kernels::compare(
            "y", i, j, y[kOffset + static_cast<size_t>(i) * y_pitch + static_cast<size_t>(j)],
            exact ? rounded : sum.value, exact ? 0 : error);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }

 private:
  static double right_at(const Stored& right, int depth, int column) {
    return kMNMajor ? right.matrix(depth, column) : right.matrix(column, depth);
  }

  kernels::Bounded expected(int i, int j) const {
    kernels::Bounded sum;
    if (j >= n) {
      sum.value = kBetweenRows;
      return sum;
    }
    for (int l = 0; l < k; ++l) sum.add(p.matrix(i, l) * right_at(q, l, j));
    for (int term = 0; term < terms; ++term) {
      const double scale =
          term < terms - 1 ? 1.0 / lora_ext::kernel::kLoScale<T> : 1.0;  // lo comes first
      const double factor = scale * (kMasked ? mask.factor(i, j) : 1);
      for (int l = 0; l < rank; ++l)
        sum.add(factor * t[term]->matrix(i, l) * right_at(*u[term], l, j));
    }
    if (with_bias) sum.add(bias(0, j));
    if (base != nullptr) sum.add(base->matrix(i, j));
    return sum;
  }
};

}  // namespace kernels
