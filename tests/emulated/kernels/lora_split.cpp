// Runs lora_split on one to three matrices of any size, stride and type, which may lie in a stack
// of adapters: rows, or columns of a transposed one, far apart.
#include "emulated/kernels/lora_split.h"

#include "emulated/kernels/operand.h"
#include "emulated/kernels/variants.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

#define EXTERN_INSTANCE(variant, ...) extern LORA_SPLIT_INSTANCE(__VA_ARGS__);
LORA_SPLIT_VARIANTS(EXTERN_INSTANCE)

namespace {

using kernels::Case;

constexpr double kUnwritten = -12345;

// A matrix of any magnitude from 2^-20 on, [rows, columns] or transposed, and where its halves go.
template <class T>
struct Source {
  int rows, columns, width;
  bool transposed, in_float, with_lo;
  float scale;
  std::vector<double> values;  // [rows, columns]
  kernels::WrittenRows<float> floats;
  kernels::WrittenRows<T> halves, hi, lo;

  Source(int rows_, int columns_, std::mt19937_64& random)
      : rows(rows_),
        columns(columns_),
        width(columns + static_cast<int>(random() % 9)),
        transposed(random() % 2),
        in_float(random() % 2),
        with_lo(random() % 2),
        scale(random() % 2 ? 1.f : 1.7f),
        values(static_cast<size_t>(rows) * columns),
        floats(in_float ? outer() : 0, inner(), kernels::draw_far_apart(outer(), random), 0,
               "matrix"),
        halves(in_float ? 0 : outer(), inner(), kernels::draw_far_apart(outer(), random),
               kernels::from_double<T>(0), "matrix"),
        hi(rows, width + static_cast<int>(random() % 3), kernels::draw_far_apart(rows, random),
           kernels::from_double<T>(kUnwritten), "hi"),
        lo(rows, hi.width(), hi.far_apart(), kernels::from_double<T>(kUnwritten), "lo") {
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
          halves.data()[at] = kernels::from_double<T>(value);
        }
        values[static_cast<size_t>(i) * columns + j] =
            in_float ? value : kernels::to_double(halves.data()[at]);
      }
    }
  }
  int outer() const { return transposed ? columns : rows; }
  int inner() const { return transposed ? rows : columns; }
  int64_t outer_stride() const { return in_float ? floats.pitch() : halves.pitch(); }
  int64_t row_stride() const { return transposed ? 1 : outer_stride(); }
  int64_t column_stride() const { return transposed ? outer_stride() : 1; }

  LoraSplitMatrix<T> parameters() {
    LoraSplitMatrix<T> matrix{};
    matrix.m = in_float ? static_cast<const void*>(floats.data())
                        : static_cast<const void*>(halves.data());
    matrix.halves[0] = hi.data(), matrix.halves[1] = with_lo ? lo.data() : nullptr;
    matrix.row_stride = row_stride(), matrix.column_stride = column_stride();
    matrix.pitch = hi.pitch(), matrix.rows = rows, matrix.columns = columns, matrix.width = width;
    matrix.in_float = in_float, matrix.scale = scale;
    return matrix;
  }

  std::string compare() const {
    const double unwritten = kernels::to_double(kernels::from_double<T>(kUnwritten));
    const double unit = kernels::rounding_unit<T>();
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < hi.width(); ++j) {
        const double high = kernels::to_double(hi(i, j)), low = kernels::to_double(lo(i, j));
        if (j >= width && (high != unwritten || low != unwritten))
          return emulator::format("[%d][%d], between the rows, was written", i, j);
        if (j >= width) continue;
        if (!with_lo && low != unwritten) return emulator::format("lo[%d][%d] was written", i, j);
        const double value = j < columns ? scale * values[static_cast<size_t>(i) * columns + j] : 0;
        // 2^-24 for scale * value in float; then a rounding each, with the halves' own floor.
        const double relative = 0x1p-24 + (with_lo ? unit * unit : unit);
        const double floor = j >= columns ? 0 : 0x1p-25 / (with_lo ? kLoScale<T> : 1.f);
        const std::string difference =
            kernels::compare("hi + lo", i, j, high + (with_lo ? low / kLoScale<T> : 0), value,
                             relative * std::fabs(value) + floor);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  }
};

template <class T>
std::string run_split(const Case& run) {
  const auto [name, rows, columns, count] = run.size;
  std::mt19937_64 random(run.seed);
  std::vector<std::unique_ptr<Source<T>>> sources;
  LoraSplitParams<T> params{};
  for (int i = 0; i < count; ++i) {  // of unequal sizes, that one grid covers
    sources.push_back(
        std::make_unique<Source<T>>(1 + static_cast<int>(random() % rows), columns, random));
    params.matrix[i] = sources[static_cast<size_t>(i)]->parameters();
  }
  emulator::Stream stream;
  stream.launch(
      {.grid = dim3(1 + static_cast<unsigned>(random() % 3), static_cast<unsigned>(count)),
       .block = dim3(256)},
      lora_split<T>, params);
  kernels::run_timed(stream);
  for (const auto& source : sources) {
    const std::string difference = source->compare();
    if (!difference.empty()) return difference;
  }
  return "";
}

#define VARIANT(name, ...) {#name, run_split<__VA_ARGS__>},
const std::vector<kernels::Variant> kVariants = {LORA_SPLIT_VARIANTS(VARIANT)};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_split",
                                {{"three", 60, 24, 3}, {"two", 35, 17, 2}, {"one", 300, 1, 1}},
                                lora_ext::kernel::kVariants);
}
