// Random operands in global memory, aligned or not, for the kernels' host programs.
#pragma once
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

}  // namespace kernels
