// The reference for the kernels: plain loops in double, and random operands. Uses only the buffers
// of the execution layer.
//
// Operands are either small integers, so that every sum is exact in fp32 in any order and the
// comparison is exact, too, or real numbers, where each element has its own error bound.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator/memory/global_memory.h"

namespace lora_ext::kernel {}
namespace lora_ext::plan {}

namespace kernels {

using namespace lora_ext::kernel;
namespace plan = lora_ext::plan;
using emulator::GlobalBuffer;
using Random = std::mt19937_64;

enum class Numbers { Integers, Reals };

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }
inline double to_double(__nv_bfloat16 value) { return __bfloat162float(value); }
inline double to_double(__half value) { return __half2float(value); }

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half(static_cast<float>(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(static_cast<float>(value));
  return static_cast<float>(value);
}

// Half the distance between neighbours, relative to the number: 2^-p with p bits of significand.
template <class T>
constexpr double rounding_unit() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
}

// The error of rounding a number of this size to T: also below fp16's smallest normal number, where
// neighbours are 2^-24 apart. (bf16's are as small as float's.)
template <class T>
double rounding_error(double magnitude) {
  const double least = std::is_same_v<T, __half> ? 0x1p-25 : 0;
  return std::fmax(rounding_unit<T>() * magnitude, least);
}

// Row-major [rows, columns], rows `pitch` elements apart; the elements between the rows are NaN.
template <class T>
struct Matrix {
  int rows, columns, pitch;
  std::vector<T> values;

  Matrix(int rows_, int columns_, int pitch_)
      : rows(rows_),
        columns(columns_),
        pitch(pitch_),
        values(static_cast<size_t>(rows_) * pitch_, from_double<T>(NAN)) {}
  T& at(int row, int column) { return values[static_cast<size_t>(row) * pitch + column]; }
  double operator()(int row, int column) const {
    return to_double(values[static_cast<size_t>(row) * pitch + column]);
  }
};

inline int padded(int columns) { return (columns + 7) / 8 * 8; }  // 16 bytes of 16-bit elements

template <class T>
Matrix<T> random_matrix(int rows, int columns, int pitch, Numbers numbers, Random& random) {
  Matrix<T> matrix(rows, columns, pitch);
  std::uniform_int_distribution<int> integer(-2, 2);
  std::uniform_real_distribution<double> real(-1, 1);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      matrix.at(i, j) =
          from_double<T>(numbers == Numbers::Integers ? integer(random) : real(random));
    }
  }
  return matrix;
}

// A value and the error that fp32 arithmetic in any order may make.
struct Bounded {
  double value = 0, magnitude = 0;  // of the sum, and of its terms' absolute values
  int terms = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
  // Truncation instead of rounding in the tensor core's adder doubles the unit.
  double error() const { return (terms + 2) * 2 * rounding_unit<float>() * magnitude; }
};

// An error of a kernel, which ends the run.
struct Difference : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 1, 2)]] inline void differ(const char* format, ...) {
  char text[300];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Difference(text);
}

// Throws Difference. `error` is 0 where the comparison is exact.
template <class T>
void compare(const char* name, int row, int column, T got, double expected, double error) {
  const double value = to_double(got);
  if (std::fabs(value - expected) <= error) return;
  differ("%s[%d, %d]: expected %.9g +- %.3g, but got %.9g", name, row, column, expected, error,
         value);
}

// The same for a sum with its error, rounded to the type that was stored.
template <class T, class Sum>
void compare_rounded(const char* name, int row, int column, T got, const Sum& sum, bool exact) {
  const double rounded = to_double(from_double<T>(sum.value)), size = std::fabs(sum.value);
  compare(name, row, column, got, exact ? rounded : sum.value,
          exact ? 0 : sum.error() + rounding_error<T>(size + sum.error()));
}

}  // namespace kernels
