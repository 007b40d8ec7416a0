// Matrices in float64; each value has a bound of the error that representations and float sums may
// add.
#pragma once
#include "emulated/kernels/reference.h"
#include "kernels/tile/halves.h"

namespace kernels {

// A number, or a partial sum of products, and the error that kernels may have.
struct Value {
  double value = 0, off = 0, magnitude = 0;
  int terms = 0;

  double error() const { return off; }
  void add(const Value& a, const Value& b) {
    value += a.value * b.value, magnitude += std::fabs(a.value * b.value), ++terms;
    off += a.off * (std::fabs(b.value) + b.off) + std::fabs(a.value) * b.off;
  }
  Value sum() const {
    return {value, off + (terms + 8) * 3 * 0x1p-23 * (magnitude + off), magnitude, terms};
  }
  Value times(double factor) const {
    return {value * factor, off * factor, magnitude * factor, terms};
  }
};

// The value of a float stored as one half or two.
template <class T>
Value as_half(Value number, bool two) {
  const double unit = rounding_unit<T>();
  const double relative = (two ? unit * unit : unit) + 0x1p-23;
  const double floor = 0x1p-25 / (two ? kLoScale<T> : 1.f);
  number.off += relative * (std::fabs(number.value) + number.off) + floor;
  return number;
}

// For integers: the only value that rounding to T may give.
template <class T>
Value rounded(Value number) {
  number.value = to_double(from_double<T>(number.value));
  return number;
}

// `scale` times a sum, as one half or two.
template <class T>
Value scaled_halves(const Value& number, float scale, bool two, bool exact) {
  if (exact && !two) return rounded<T>(number.times(scale));
  return as_half<T>(number.times(scale), two);
}

// [rows, columns], row-major.
struct Values {
  int rows, columns;
  std::vector<Value> values;
  Values(int rows_, int columns_)
      : rows(rows_), columns(columns_), values(static_cast<size_t>(rows) * columns) {}
  template <class V>
  explicit Values(const Matrix<V>& matrix) : Values(matrix.rows, matrix.columns) {
    each([&](Value& value, int i, int j) {
      value.value = matrix(i, j), value.magnitude = std::fabs(matrix(i, j));
    });
  }
  Value& operator()(int i, int j) { return values[static_cast<size_t>(i) * columns + j]; }
  const Value& operator()(int i, int j) const {
    return values[static_cast<size_t>(i) * columns + j];
  }
  template <class Visit>
  Values& each(const Visit& visit) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) visit((*this)(i, j), i, j);
    return *this;
  }
  Values transposed() const {
    return Values(columns, rows).each([&](Value& to, int i, int j) { to = (*this)(j, i); });
  }
};

// left right^T.
inline Values product(const Values& left, const Values& right) {
  return Values(left.rows, right.rows).each([&](Value& to, int i, int j) {
    for (int l = 0; l < left.columns; ++l) to.add(left(i, l), right(j, l));
    to = to.sum();
  });
}

template <class Got>
void compare(const char* name, const Values& expected, const Got& got, double unit, bool exact) {
  for (int i = 0; i < expected.rows; ++i) {
    for (int j = 0; j < expected.columns; ++j) {
      const Value& sum = expected(i, j);
      const double tolerance = sum.off + unit * (std::fabs(sum.value) + sum.off) + 0x1p-25;
      compare(name, i, j, got[static_cast<size_t>(i) * expected.columns + j], sum.value,
              exact ? 0 : tolerance);
    }
  }
}

// |got - expected| / |expected|, both as vectors.
template <class Got>
double relative_error(const Values& expected, const Got& got) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    difference += std::pow(got[i] - expected.values[i].value, 2);
    size += std::pow(expected.values[i].value, 2);
  }
  return size == 0 ? 0 : std::sqrt(difference / size);
}

}  // namespace kernels
