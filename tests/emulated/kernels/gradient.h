// A gradient of an adapter in global memory: [rank, c] or transposed, in float or T.
#pragma once
#include "emulated/kernels/operand.h"
#include "emulator/emulator.h"
#include "kernel/lora_reduce_wgrad.h"

namespace kernels {

template <class T>
class Gradient {
 public:
  Gradient(int rank, int c, std::mt19937_64& random)
      : rank_(rank),
        c_(c),
        transposed_(random() % 2),
        in_float_(random() % 2),
        half_(static_cast<size_t>(in_float_ ? 0 : rank) * c, "gradient"),
        float_(static_cast<size_t>(in_float_ ? rank : 0) * c, "gradient in float") {}

  lora_ext::kernel::LoraReduceGradient reduce(const float* partial, int splits, int terms,
                                              int columns, int lo_column, float scale) {
    void* to = in_float_ ? static_cast<void*>(float_.data()) : static_cast<void*>(half_.data());
    return {partial, to,        c_,          rank_,     splits, terms,
            columns, lo_column, transposed_, in_float_, scale};
  }

  // expected(r, column) gives the sum with its error. "" or what differs.
  template <class Expected>
  std::string compare(kernels::Numbers numbers, const Expected& expected) const {
    for (int r = 0; r < rank_; ++r) {
      for (int column = 0; column < c_; ++column) {
        const size_t at = transposed_ ? static_cast<size_t>(column) * rank_ + r
                                      : static_cast<size_t>(r) * c_ + column;
        const kernels::Bounded sum = expected(r, column);
        const double got = in_float_ ? float_[at] : kernels::to_double(half_[at]);
        const double rounding = in_float_ ? 0 : kernels::rounding_unit<T>();
        double value = sum.value, tolerance = 0;
        if (numbers == kernels::Numbers::Integers) {
          if (!in_float_) value = kernels::to_double(kernels::from_double<T>(value));
        } else {
          tolerance = sum.error() + rounding * (std::fabs(value) + sum.error());
        }
        const std::string difference =
            kernels::compare("gradient", r, column, got, value, tolerance);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }

 private:
  int rank_, c_;
  bool transposed_, in_float_;
  emulator::GlobalBuffer<T> half_;
  emulator::GlobalBuffer<float> float_;
};

}  // namespace kernels
