// Matrices in float64, each value with a bound of what representations and float sums may add to
// it.
#pragma once
#include "emulated/kernels/reference.h"
#include "emulator/emulator.h"
#include "kernel/halves.h"

namespace kernels {

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
Values values_of(const kernels::Matrix<V>& matrix) {
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
  const double unit = kernels::rounding_unit<T>();
  const double relative = two ? unit * unit + 0x1p-23 : unit + 0x1p-23;
  const double floor = 0x1p-25 / (two ? lora_ext::kernel::kLoScale<T> : 1.f);
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

template <class Got>
std::string compare(const char* name, const Values& expected, const Got& got, double unit,
                    bool exact) {
  for (int i = 0; i < expected.rows; ++i) {
    for (int j = 0; j < expected.columns; ++j) {
      const double value = expected.value[expected.at(i, j)];
      const double error = expected.error[expected.at(i, j)];
      const double tolerance = exact ? 0 : error + unit * (std::fabs(value) + error) + 0x1p-25;
      const std::string difference =
          kernels::compare(name, i, j, got(expected.at(i, j)), value, tolerance);
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

}  // namespace kernels
