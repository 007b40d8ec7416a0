// Random operands and masks in global memory, for the kernels' host programs.
#pragma once
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "emulated/kernels/reference.h"
#include "emulated/kernels/reference_mask.h"
#include "emulator/memory/global_memory.h"
#include "kernel/lora_gemm.h"

namespace kernels {

using lora_ext::kernel::Alignment;

// The layer's buffers are aligned; an odd offset and an odd pitch are what kElement is for.
template <Alignment kAlignment>
struct Layout {
  static constexpr int kOffset = kAlignment == Alignment::kVector ? 0 : 1;
  static int pitch(int columns) {
    return kAlignment == Alignment::kVector ? kernels::padded(columns) : columns + 3;
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
inline bool draw_far_apart(int rows, std::mt19937_64& random) {
  return random() % 8 == 0 && rows >= 3 && rows <= 70 && !kRaceChecked;
}

// Address space whose pages exist once they are written: rows so far apart that offsets need 64
// bits.
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

// Row-major in T, with NaN between the rows, or with rows 2 GiB apart.
template <class T, Alignment kAlignment>
struct Operand {
  using Here = Layout<kAlignment>;
  kernels::Matrix<T> matrix;
  bool far_apart;
  SparseMemory sparse;
  emulator::GlobalBuffer<T> buffer;

  Operand(int rows, int columns, kernels::Numbers numbers, std::mt19937_64& random,
          const char* name, bool may_be_far = true)
      : matrix(kernels::random_matrix<T>(rows, columns, Here::pitch(columns), numbers, random)),
        far_apart(may_be_far && draw_far_apart(rows, random)),
        sparse(far_apart ? static_cast<size_t>(rows) * kFarPitch * sizeof(T) : 0),
        buffer(far_apart ? 0 : Here::kOffset + matrix.values.size(), name) {
    if (far_apart) {
      for (int i = 0; i < rows; ++i)
        std::copy_n(&matrix.at(i, 0), columns, rows_apart() + i * kFarPitch);
    } else {
      buffer.fill(kernels::from_double<T>(NAN));
      std::copy(matrix.values.begin(), matrix.values.end(), buffer.begin() + Here::kOffset);
    }
  }
  const T* data() const { return far_apart ? rows_apart() : buffer.data() + Here::kOffset; }
  int64_t pitch() const { return far_apart ? kFarPitch : matrix.pitch; }

 private:
  T* rows_apart() const { return static_cast<T*>(sparse.data()) + Here::kOffset; }
};

// Rows that a kernel writes, `width` columns each of which the last are not its own, filled with
// `unwritten`: in one buffer, or far apart.
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
  V* data() { return first() + offset_; }
  int64_t pitch() const { return pitch_; }
  int width() const { return width_; }
  bool far_apart() const { return sparse_.data() != nullptr; }
  V operator()(int row, int column) const { return first()[offset_ + row * pitch_ + column]; }

 private:
  V* first() const {
    return far_apart() ? static_cast<V*>(sparse_.data()) : const_cast<V*>(buffer_.data());
  }
  int width_;
  int64_t pitch_;
  int offset_;
  SparseMemory sparse_;
  emulator::GlobalBuffer<V> buffer_;
};

// A mask at random offsets, with a seed in global memory. With integers the scale is one, too. Of a
// shard, which tensor parallelism makes, columns begin at a multiple of whole fragments.
struct RandomMask {
  ReferenceMask reference;
  emulator::GlobalBuffer<int64_t> seed;
  float keep_scale;

  RandomMask(kernels::Numbers numbers, std::mt19937_64& random, bool may_be_shard = false)
      : reference{random(), static_cast<int64_t>(random() % 2 ? 0 : (1ll << 33) + 5),
                  column_offset(random, may_be_shard), 49152},
        seed(std::vector<int64_t>{static_cast<int64_t>(reference.seed)}, "seed"),
        keep_scale(numbers == kernels::Numbers::Integers ? 2.f : 65536.f / 49152.f) {}

  lora_ext::kernel::Mask parameters() const {
    return {seed.data(), reference.row_offset, reference.col_offset, reference.keep_count,
            keep_scale};
  }
  static int64_t column_offset(std::mt19937_64& random, bool may_be_shard) {
    if (!may_be_shard) return static_cast<int64_t>(random() % 2 ? 0 : random() % 100);
    const auto kind = random() % 3, offset = 1 + random() % 100;
    return static_cast<int64_t>(kind == 0 ? 0 : kind == 1 ? offset * 32 : offset);
  }
  // What an element is multiplied by.
  double factor(int row, int column) const { return reference.kept(row, column) ? keep_scale : 0; }
};

}  // namespace kernels
