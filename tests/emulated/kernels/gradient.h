// A gradient of an adapter in global memory: [rank, c] or transposed, in float or T.
#pragma once
#include "emulated/kernels/operand.h"
#include "kernels/skinny/elementwise.h"

namespace kernels {

template <class T>
class Gradient {
 public:
  Gradient(int rank, int c, Random& random)
      : rank_(rank),
        c_(c),
        transposed_(random() % 2),
        numbers_(static_cast<size_t>(rank) * c, random() % 2, "gradient") {}

  LoraReduceGradient reduce(const float* partial, int splits, int terms, int columns, int lo_column,
                            float scale) {
    return {partial,     numbers_.data(),   c_,   rank_, splits, terms, columns, lo_column,
            transposed_, numbers_.in_float, scale};
  }

  // expected(r, column) gives the sum with its error.
  template <class Expected>
  void compare(const char* name, Numbers numbers, const Expected& expected) const {
    const bool exact = numbers == Numbers::Integers;
    for (int r = 0; r < rank_; ++r) {
      for (int column = 0; column < c_; ++column) {
        const size_t at = transposed_ ? static_cast<size_t>(column) * rank_ + r
                                      : static_cast<size_t>(r) * c_ + column;
        const Bounded sum = expected(r, column);
        if (numbers_.in_float) {
          kernels::compare(name, r, column, numbers_.floats[at], sum.value,
                           exact ? 0 : sum.error());
        } else {
          compare_rounded(name, r, column, numbers_.halves[at], sum, exact);
        }
      }
    }
  }

 private:
  int rank_, c_;
  bool transposed_;
  FloatOrHalf<T> numbers_;
};

}  // namespace kernels
