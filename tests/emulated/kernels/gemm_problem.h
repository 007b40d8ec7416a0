// A random problem of lora_gemm, Y = P Q + mask * (T U) + bias, or onto a base, and the expected Y.
#pragma once
#include "emulated/kernels/operand.h"
#include "kernels/tile/halves.h"

namespace kernels {

// kAlignment: of Y and the base.
template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct GemmProblem {
  using Stored = VectorOperand<T>;
  static constexpr double kBetweenRows = -12345;

  Random& random;
  const int m, n, depth, k, rank;
  int stored = n;  // columns of Y that are written: zero from n on
  const int terms = random() % 3 == 0 ? 3 : 1;
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const bool with_bias = !kMasked && random() % 4 != 0, float_bias = random() % 2;
  const bool trigger_dependents = random() % 4 != 0;
  const Stored p{m, depth, numbers, random, "p"};
  const Stored q{kMNMajor ? depth : n, kMNMajor ? n : depth, numbers, random, "q"};
  std::unique_ptr<Stored> t[3], u[3];
  const Bias<T> bias{n, numbers, random};
  const WrittenRows<T> y{m,   Layout<kAlignment>::pitch(n) + 8, false, from_double<T>(kBetweenRows),
                         "y", Layout<kAlignment>::kOffset};
  const RandomMask mask{numbers, random};
  std::unique_ptr<Operand<T, kAlignment>> base;
  bool in_place = false;  // Y holds the base

  // With k = 0 it is only the low-rank product; p and q then have depth `depth`.
  GemmProblem(int m_, int n_, int depth_, int k_, int rank_, Random& random_, bool may_have_base)
      : random(random_), m(m_), n(n_), depth(depth_), k(k_), rank(rank_) {
    for (int i = 0; i < terms; ++i) {  // all have one pitch
      t[i] = std::make_unique<Stored>(m, rank, numbers, random, "t", false);
      u[i] = std::make_unique<Stored>(kMNMajor ? rank : n, kMNMajor ? n : rank, numbers, random,
                                      "u", false);
    }
    if (!may_have_base || random() % 2) return;
    base = std::make_unique<Operand<T, kAlignment>>(m, n, numbers, random, "base");
    in_place = random() % 2;
    for (int i = 0; in_place && i < m; ++i)
      std::copy_n(&base->matrix.at(i, 0), n, y.data() + i * y.pitch());
  }

  LoraGemmParams<T> params() {
    LoraGemmParams<T> params{};
    if (k > 0) params.p = p.data(), params.q = q.data();
    params.y = y.data();
    params.p_pitch = p.pitch(), params.q_pitch = q.pitch(), params.y_pitch = y.pitch();
    params.t_pitch = t[0]->pitch(), params.u_pitch = u[0]->pitch();
    for (int i = 0; i < terms; ++i) params.low_rank[i] = {t[i]->data(), u[i]->data()};
    if (with_bias) params.bias = bias.data(float_bias);
    if (base != nullptr) {
      params.base = in_place ? params.y : base->data();
      params.base_pitch = in_place ? y.pitch() : base->pitch();
    }
    params.whole_chunks = kAlignment == Alignment::kVector;
    params.float_bias = float_bias, params.trigger_dependents = trigger_dependents;
    params.m = m, params.n = n, params.k = k, params.rank = rank, params.terms = terms;
    params.mask = mask.parameters();
    return params;
  }

  // Checks that Y is right, and that nothing is written between its rows.
  void check() const {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < y.width(); ++j)
        compare_rounded("y", i, j, y(i, j), expected(i, j), numbers == Numbers::Integers || j >= n);
  }

 private:
  static double right_at(const Stored& right, int depth, int column) {
    return kMNMajor ? right.matrix(depth, column) : right.matrix(column, depth);
  }

  Bounded expected(int i, int j) const {
    Bounded sum;
    if (j >= n) {
      sum.value = j < stored ? 0 : kBetweenRows;
      return sum;
    }
    for (int l = 0; l < k; ++l) sum.add(p.matrix(i, l) * right_at(q, l, j));
    for (int term = 0; term < terms; ++term) {
      const double scale = term < terms - 1 ? 1.0 / kLoScale<T> : 1.0;  // lo comes first
      const double factor = scale * (kMasked ? mask.factor(i, j) : 1);
      for (int l = 0; l < rank; ++l)
        sum.add(factor * t[term]->matrix(i, l) * right_at(*u[term], l, j));
    }
    if (with_bias) sum.add(bias.matrix(0, j));
    if (base != nullptr) sum.add(base->matrix(i, j));
    return sum;
  }
};

}  // namespace kernels
