// Random operands and masks in global memory, for the kernels' host programs.
#pragma once
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "emulated/kernels/reference.h"
#include "emulated/kernels/reference_mask.h"
#include "kernels/gemm/params.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/halves.h"

namespace kernels {

// The layer's buffers are aligned; an odd offset and an odd pitch require kElement.
template <Alignment kAlignment>
struct Layout {
  static constexpr int kOffset = kAlignment == Alignment::kVector ? 0 : 1;
  static int pitch(int columns) {
    return kAlignment == Alignment::kVector ? padded(columns) : columns + 3;
  }
};

// The race checker's shadow has no room for rows that are far apart.
#ifdef EMULATOR_RACE
inline constexpr bool kRaceChecked = true;
#else
inline constexpr bool kRaceChecked = false;
#endif
// From the third row on, offsets in elements overflow 32 bits.
inline constexpr int64_t kFarPitch = (int64_t{1} << 30) + 8;
// Whether `rows` rows are to be far apart, in one of eight runs.
inline bool draw_far_apart(int rows, Random& random) {
  return random() % 8 == 0 && rows >= 3 && rows <= 70 && !kRaceChecked;
}

// Address space whose pages are allocated when they are written: for rows so far apart that offsets
// need 64 bits.
class SparseMemory {
 public:
  explicit SparseMemory(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory_ == MAP_FAILED) {
      std::perror("cannot map rows that are far apart");
      std::abort();
    }
  }
  ~SparseMemory() {
    if (bytes_ != 0) munmap(memory_, bytes_);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  void* data() const { return memory_; }

 private:
  size_t bytes_;
  void* memory_ = nullptr;
};

// Rows of `width` columns, filled with `unwritten`: in one buffer, or 2 GiB apart.
template <class V>
class WrittenRows {
 public:
  WrittenRows(int rows, int width, bool far_apart, V unwritten, const char* name, int offset = 0)
      : width_(width),
        pitch_(far_apart ? kFarPitch : width),
        offset_(offset),
        sparse_(far_apart ? static_cast<size_t>(rows) * kFarPitch * sizeof(V) : 0),
        buffer_(far_apart ? 0 : static_cast<size_t>(offset) + static_cast<size_t>(rows) * width,
                name) {
    if (!far_apart) buffer_.fill(unwritten);
    for (int i = 0; far_apart && i < rows; ++i) std::fill_n(data() + i * pitch_, width, unwritten);
  }
  V* data() const {
    return offset_ +
           (far_apart() ? static_cast<V*>(sparse_.data()) : const_cast<V*>(buffer_.data()));
  }
  int64_t pitch() const { return pitch_; }
  int width() const { return width_; }
  bool far_apart() const { return sparse_.data() != nullptr; }
  V operator()(int row, int column) const { return data()[row * pitch_ + column]; }

 private:
  int width_;
  int64_t pitch_;
  int offset_;
  SparseMemory sparse_;
  GlobalBuffer<V> buffer_;
};

// Row-major in T, with NaN between the rows, or with rows far apart.
template <class T, Alignment kAlignment>
struct Operand {
  using Here = Layout<kAlignment>;
  Matrix<T> matrix;
  WrittenRows<T> stored;

  Operand(int rows, int columns, Numbers numbers, Random& random, const char* name,
          bool may_be_far = true)
      : matrix(random_matrix<T>(rows, columns, Here::pitch(columns), numbers, random)),
        stored(rows, matrix.pitch, may_be_far && draw_far_apart(rows, random), from_double<T>(NAN),
               name, Here::kOffset) {
    for (int i = 0; i < rows; ++i)
      std::copy_n(&matrix.at(i, 0), columns, stored.data() + i * stored.pitch());
  }
  const T* data() const { return stored.data(); }
  int64_t pitch() const { return stored.pitch(); }
};

template <class T>
using VectorOperand = Operand<T, Alignment::kVector>;

// A bias, in T and in float.
template <class T>
struct Bias {
  Matrix<T> matrix;
  GlobalBuffer<T> halves;
  GlobalBuffer<float> floats;

  Bias(int n, Numbers numbers, Random& random)
      : matrix(random_matrix<T>(1, n, n, numbers, random)),
        halves(matrix.values, "bias"),
        floats({matrix.values.begin(), matrix.values.end()}, "bias in float") {}
  const void* data(bool in_float) const {
    return in_float ? static_cast<const void*>(floats.data())
                    : static_cast<const void*>(halves.data());
  }
};

// Numbers in float or in T.
template <class T>
struct FloatOrHalf {
  bool in_float;
  GlobalBuffer<float> floats;
  GlobalBuffer<T> halves;

  FloatOrHalf(size_t size, bool in_float_, const char* name)
      : in_float(in_float_), floats(in_float ? size : 0, name), halves(in_float ? 0 : size, name) {}
  void* data() {
    return in_float ? static_cast<void*>(floats.data()) : static_cast<void*>(halves.data());
  }
  double operator[](size_t at) const { return in_float ? floats[at] : to_double(halves[at]); }
};

// The value of a float stored as one half or two: a rounding each, with the halves' own floor. The
// float may be off by `error`.
template <class T>
void compare_halves(const char* name, int row, int column, T hi, T lo, bool with_lo, double number,
                    double error) {
  const double unit = rounding_unit<T>(), scale = with_lo ? kLoScale<T> : 1;
  const double relative = (with_lo ? unit * unit : unit) + 0x1p-23;
  compare(name, row, column, to_double(hi) + (with_lo ? to_double(lo) / scale : 0), number,
          relative * std::fabs(number) + 0x1p-25 / scale + error);
}

// A mask at random offsets, with a seed in global memory. With integers the scale is one, too. For
// a shard, as tensor parallelism makes, columns begin at a multiple of whole fragments.
struct RandomMask {
  ReferenceMask reference;
  GlobalBuffer<int64_t> seed;
  float keep_scale;

  RandomMask(Numbers numbers, Random& random, bool may_be_shard = false)
      : reference{random(), static_cast<int64_t>(random() % 2 ? 0 : (1ll << 33) + 5),
                  column_offset(random, may_be_shard), 49152},
        seed(std::vector<int64_t>{static_cast<int64_t>(reference.seed)}, "seed"),
        keep_scale(numbers == Numbers::Integers ? 2.f : 65536.f / 49152.f) {}

  Mask parameters() const {
    return {seed.data(), reference.row_offset, reference.col_offset, reference.keep_count,
            keep_scale};
  }
  static int64_t column_offset(Random& random, bool may_be_shard) {
    if (!may_be_shard) return static_cast<int64_t>(random() % 2 ? 0 : random() % 100);
    const auto kind = random() % 3, offset = 1 + random() % 100;
    return static_cast<int64_t>(kind == 0 ? 0 : kind == 1 ? offset * 32 : offset);
  }
  // The factor of an element.
  double factor(int row, int column) const { return reference.kept(row, column) ? keep_scale : 0; }
};

}  // namespace kernels
