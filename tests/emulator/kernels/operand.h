// Random operands and masks in global memory, for the kernels' host programs.
#pragma once
#include "emulator/kernels/reference_mask.h"
#include "emulator/memory/global_memory.h"
#include "emulator/specimens/reference.h"
#include "kernel/lora_gemm.h"

namespace kernels {

using lora_ext::kernel::Alignment;

// The layer's buffers are aligned; an odd offset and an odd pitch are what kElement is for.
template <Alignment kAlignment>
struct Layout {
  static constexpr int kOffset = kAlignment == Alignment::kVector ? 0 : 1;
  static int pitch(int columns) {
    return kAlignment == Alignment::kVector ? specimens::padded(columns) : columns + 3;
  }
};

template <class T, Alignment kAlignment>
struct Operand {
  using Here = Layout<kAlignment>;
  specimens::Matrix<T> matrix;
  emulator::GlobalBuffer<T> buffer;

  Operand(int rows, int columns, specimens::Numbers numbers, std::mt19937_64& random,
          const char* name)
      : matrix(specimens::random_matrix<T>(rows, columns, Here::pitch(columns), numbers, random)),
        buffer(Here::kOffset + matrix.values.size(), name) {
    buffer.fill(specimens::from_double<T>(NAN));
    std::copy(matrix.values.begin(), matrix.values.end(), buffer.begin() + Here::kOffset);
  }
  const T* data() const { return buffer.data() + Here::kOffset; }
  int64_t pitch() const { return matrix.pitch; }
};

// A mask at random offsets, with a seed in global memory. With integers the scale is one, too.
struct RandomMask {
  ReferenceMask reference;
  emulator::GlobalBuffer<int64_t> seed;
  float keep_scale;

  RandomMask(specimens::Numbers numbers, std::mt19937_64& random)
      : reference{random(), static_cast<int64_t>(random() % 2 ? 0 : (1ll << 33) + 5),
                  static_cast<int64_t>(random() % 2 ? 0 : random() % 100), 49152},
        seed(std::vector<int64_t>{static_cast<int64_t>(reference.seed)}, "seed"),
        keep_scale(numbers == specimens::Numbers::Integers ? 2.f : 65536.f / 49152.f) {}

  lora_ext::kernel::Mask parameters() const {
    return {seed.data(), reference.row_offset, reference.col_offset, reference.keep_count,
            keep_scale};
  }
  // What an element is multiplied by.
  double factor(int row, int column) const { return reference.kept(row, column) ? keep_scale : 0; }
};

}  // namespace kernels
