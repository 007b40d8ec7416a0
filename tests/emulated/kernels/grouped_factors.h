// The factors of many adapters in global memory, and their gradients, for the kernels' host
// programs.
#pragma once
#include <cstring>
#include <vector>

#include "emulated/kernels/grouped_rows.h"
#include "emulated/kernels/operand.h"
#include "kernels/tile/halves.h"

namespace kernels {

// A [rank, k] and B [n, rank] of each adapter, in a pool or in a list, with `between` unused
// elements after each. B's may be interleaved in a pool: their elements are neighbours there.
template <class F>
struct GroupedPool {
  using Entry = LoraGroupedEntry;

  const bool pooled;
  const int64_t b_step, a_pitch, b_pitch, a_stride, b_stride;
  GlobalBuffer<int> ranks;
  GlobalBuffer<F> all_a, all_b;
  GlobalBuffer<Entry> entries;

  GroupedPool(const GroupedRows& rows, int n, bool pooled_, int a_pitch_, int b_pitch_, int between,
              double fill, bool interleaved = false)
      : pooled(pooled_),
        b_step(interleaved ? rows.groups + 1 : 1),
        a_pitch(a_pitch_),
        b_pitch(b_pitch_ * b_step),
        a_stride(rows.max_rank * a_pitch + between),
        b_stride(interleaved ? 1 : n * b_pitch + between),
        ranks(rows.ranks, "ranks"),
        all_a(static_cast<size_t>(rows.groups * a_stride), "A of adapters"),
        all_b(static_cast<size_t>(interleaved ? n * b_pitch : rows.groups * b_stride),
              "B of adapters"),
        entries(static_cast<size_t>(rows.groups), "entries") {
    all_a.fill(from_double<F>(fill)), all_b.fill(from_double<F>(fill)), entries.fill({});
    for (int g = 0; g < rows.groups; ++g)
      entries[g] = {all_a.data() + g * a_stride, all_b.data() + g * b_stride, a_pitch, b_pitch,
                    rows.ranks[g]};
  }
  LoraGroupedFactors parameters() const {
    if (!pooled) return {entries.data(), nullptr, nullptr, 0, 0, 0, 0, nullptr};
    // Kernels write gradients.
    return {nullptr,
            const_cast<F*>(all_a.data()),
            const_cast<F*>(all_b.data()),
            a_stride,
            b_stride,
            a_pitch,
            b_pitch,
            ranks.data(),
            b_step};
  }
  // On the host; null for a pool.
  const Entry* list() const { return pooled ? nullptr : entries.data(); }
  F& a(int g, int r, int column) const {
    return static_cast<F*>(entries[g].a)[r * entries[g].a_pitch + column];
  }
  F& b(int g, int row, int r) const {
    return static_cast<F*>(entries[g].b)[row * entries[g].b_pitch + r * b_step];
  }
};

// NaN outside of each adapter's own rank, and in the factors of adapters that no row takes. Rows of
// factors in a list begin at any address, except for one adapter in two.
template <class F>
class GroupedFactors {
  const GroupedRows& rows_;
  const int n_, k_;
  const bool pooled_, whole_;

 public:
  GroupedPool<F> pool;

  GroupedFactors(const GroupedRows& rows, int n, int k, Numbers numbers, Random& random,
                 double size = 1)
      : rows_(rows),
        n_(n),
        k_(k),
        pooled_(random() % 2),
        whole_(random() % 2),
        // Not all of a pool is a stride's multiple, nor all of a list 16 bytes.
        pool(rows, n, pooled_, whole_ ? padded(k) : k + 3,
             whole_ ? padded(rows.max_rank + 8) : rows.max_rank + 1, whole_ ? 8 : 1, NAN) {
    const auto drawn = [&](int lines, int columns) {
      Matrix<F> matrix = random_matrix<F>(lines, columns, std::max(1, columns), numbers, random);
      for (F& value : matrix.values)
        if (numbers == Numbers::Reals) value = from_double<F>(to_double(value) * size);
      return matrix;
    };
    const std::vector<int>& taken = rows.adapter_of;
    for (int g = 0; g < rows.groups; ++g) {
      a_of_.push_back(drawn(rows.rank(g), k));
      b_of_.push_back(drawn(n, rows.rank(g)));
      const bool dense = !pooled_ && random() % 2;  // rows are contiguous
      if (dense) pool.entries[g].b_pitch = rows.rank(g);
      if (std::find(taken.begin(), taken.end(), g) == taken.end()) continue;
      put(g, [&](Matrix<F>& matrix, int i, int j) { return matrix.at(i, j); });
    }
  }

  // Puts NaN in all of an adapter's A and B.
  void spoil(int g) {
    put(g, [](Matrix<F>&, int, int) { return from_double<F>(NAN); });
  }
  // Whether an adapter's A and B consist of 16-byte chunks.
  bool a_in_chunks(int g) const { return in_chunks(&pool.a(g, 0, 0), pool.entries[g].a_pitch); }
  bool b_in_chunks(int g) const { return in_chunks(&pool.b(g, 0, 0), pool.entries[g].b_pitch); }
  double a(int adapter, int r, int column) const { return a_of_[adapter](r, column); }
  double b(int adapter, int row, int r) const { return b_of_[adapter](row, r); }

 private:
  template <class Value>
  void put(int g, const Value& value) {
    for (int r = 0; r < rows_.rank(g); ++r) {
      for (int c = 0; c < k_; ++c) pool.a(g, r, c) = value(a_of_[g], r, c);
      for (int c = 0; c < n_; ++c) pool.b(g, c, r) = value(b_of_[g], c, r);
    }
  }
  static bool in_chunks(const F* data, int64_t pitch) {
    return sizeof(F) == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 8 == 0;
  }
  std::vector<Matrix<F>> a_of_, b_of_;
};

// Gradients with the layout of their factors, and space between them that must not be written.
template <class F>
struct GroupedGradients {
  static constexpr int kBetween = 3;
  static constexpr double kUnwritten = -12345;

  const GroupedRows& rows;
  const int n, k;
  GroupedPool<F> pool;

  GroupedGradients(const GroupedRows& rows_, int n_, int k_, bool pooled, bool interleaved = false)
      : rows(rows_),
        n(n_),
        k(k_),
        pool(rows, n, pooled, k + kBetween, rows.max_rank + kBetween, kBetween, kUnwritten,
             interleaved) {}

  bool same_bits(const GroupedGradients& other) const {
    const auto same = [](const GlobalBuffer<F>& a, const GlobalBuffer<F>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(F)) == 0;
    };
    return same(pool.all_a, other.pool.all_a) && same(pool.all_b, other.pool.all_b);
  }

  // Checks the gradients of A or of B: expected(adapter, r, column) gives a sum, exact or with its
  // error.
  template <class Expected>
  void compare(char factor, bool wanted, bool exact, const Expected& expected) const {
    const bool of_a = factor == 'a';
    const int lines = of_a ? rows.max_rank : n, width = of_a ? k : rows.max_rank;
    for (int g = 0; g < rows.groups; ++g) {
      const std::string name =
          emulator::format("dlora_%c of adapter %d of rank %d", factor, g, rows.rank(g));
      for (int line = 0; line < lines; ++line) {
        for (int i = 0; i < width + kBetween; ++i) {
          const F got = of_a ? pool.a(g, line, i) : pool.b(g, line, i);
          const int r = of_a ? line : i, column = of_a ? i : line;
          const bool of_rank = r < rows.rank(g);
          if (wanted && i < width && of_rank) {
            compare_rounded(name.c_str(), line, i, got, expected(g, r, column), exact);
          } else {
            const bool cleared = wanted && i < width && pool.pooled;
            const double kept = to_double(from_double<F>(kUnwritten));
            kernels::compare(name.c_str(), line, i, got, cleared ? 0 : kept, 0);
          }
        }
      }
    }
  }
};

// A float as the kernels keep it, as hi and lo.
template <class T, class F>
double half_of(double value, bool lo) {
  if constexpr (!std::is_same_v<F, float>) return lo ? 0 : value;
  const float hi = to_double(high_half<T>(static_cast<float>(value)));
  if (!lo) return hi;
  return to_double(low_half<T>(static_cast<float>(value))) / kLoScale<T>;
}
template <class T, class F>
double as_halves(double value) {
  return half_of<T, F>(value, false) + half_of<T, F>(value, true);
}

}  // namespace kernels
