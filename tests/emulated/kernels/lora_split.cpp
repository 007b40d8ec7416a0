// Runs lora_split on one to three matrices of any size, stride and type, which may be in a stack of
// adapters: rows, or columns of a transposed one, far apart.
#include "emulated/kernels/lora_split.h"

#include <deque>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

constexpr double kUnwritten = -12345;

// A matrix of any magnitude from 2^-20 on, [rows, columns] or transposed, and where its halves go.
template <class T>
struct Source {
  Random& random;
  const int rows, columns, width = columns + static_cast<int>(random() % 9);
  const bool transposed = random() % 2, in_float = random() % 2, with_lo = random() % 2;
  const float scale = random() % 2 ? 1.f : 1.7f;
  const int outer = transposed ? columns : rows, inner = transposed ? rows : columns;
  Matrix<float> values{rows, columns, columns};
  const WrittenRows<float> floats{in_float ? outer : 0, inner, draw_far_apart(outer, random), 0,
                                  "matrix"};
  const WrittenRows<T> halves{in_float ? 0 : outer, inner, draw_far_apart(outer, random),
                              from_double<T>(0), "matrix"};
  const bool far_apart = draw_far_apart(rows, random);
  const int pitch = width + static_cast<int>(random() % 3);
  const WrittenRows<T> hi{rows, pitch, far_apart, from_double<T>(kUnwritten), "hi"};
  const WrittenRows<T> lo{rows, pitch, hi.far_apart(), from_double<T>(kUnwritten), "lo"};

  Source(int rows_, int columns_, Random& random_)
      : random(random_), rows(rows_), columns(columns_) {
    std::uniform_real_distribution<double> real(-1, 1);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        auto value = static_cast<float>(std::ldexp(real(random), -static_cast<int>(random() % 21)));
        // Above bfloat16's largest number, below float's.
        if (std::is_same_v<T, __nv_bfloat16> && in_float && with_lo && random() % 50 == 0)
          value = 3.4e38f / scale;
        const int64_t at = i * row_stride() + j * column_stride();
        if (in_float) {
          floats.data()[at] = value;
        } else {
          halves.data()[at] = from_double<T>(value);
        }
        values.at(i, j) = in_float ? value : static_cast<float>(to_double(halves.data()[at]));
      }
    }
  }
  int64_t outer_stride() const { return in_float ? floats.pitch() : halves.pitch(); }
  int64_t row_stride() const { return transposed ? 1 : outer_stride(); }
  int64_t column_stride() const { return transposed ? outer_stride() : 1; }

  LoraSplitMatrix<T> parameters() const {
    LoraSplitMatrix<T> matrix{};
    matrix.m = in_float ? static_cast<const void*>(floats.data())
                        : static_cast<const void*>(halves.data());
    matrix.halves[0] = hi.data(), matrix.halves[1] = with_lo ? lo.data() : nullptr;
    matrix.row_stride = row_stride(), matrix.column_stride = column_stride();
    matrix.pitch = hi.pitch(), matrix.rows = rows, matrix.columns = columns, matrix.width = width;
    matrix.in_float = in_float, matrix.scale = scale;
    return matrix;
  }

  void check() const {
    const double unwritten = to_double(from_double<T>(kUnwritten));
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < hi.width(); ++j) {
        if (!with_lo) compare("lo", i, j, lo(i, j), unwritten, 0);
        if (j < columns) {
          compare_halves("hi + lo", i, j, hi(i, j), lo(i, j), with_lo, scale * values(i, j), 0);
        } else {  // zero up to the width, then unchanged
          const double expected = j < width ? 0 : unwritten;
          compare("hi", i, j, hi(i, j), expected, 0);
          if (with_lo) compare("lo", i, j, lo(i, j), expected, 0);
        }
      }
    }
  }
};

template <class T>
void run_split(const Case& run) {
  const auto [name, rows, columns, count] = run.size;
  Random random(run.seed);
  std::deque<Source<T>> sources;
  LoraSplitParams<T> params{};
  for (int i = 0; i < count; ++i) {  // of unequal sizes, in one grid
    sources.emplace_back(1 + static_cast<int>(random() % rows), columns, random);
    params.matrix[i] = sources.back().parameters();
  }
  emulator::Stream stream;
  stream.launch(
      {.grid = dim3(1 + static_cast<unsigned>(random() % 3), static_cast<unsigned>(count)),
       .block = dim3(256)},
      lora_split<T>, params);
  run_timed(stream);
  for (const auto& source : sources) source.check();
}

}  // namespace

#define VARIANT(name, ...) {#name, run_split<__VA_ARGS__>},
const Program program{"lora_split",
                      {LORA_SPLIT_VARIANTS(VARIANT)},
                      {{"three", 60, 24, 3}, {"two", 35, 17, 2}, {"one", 300, 1, 1}}};

}  // namespace kernels
