// An operand of the whole LoRA linear: a half or float matrix in global memory.
#pragma once
#include <memory>

#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/operand.h"
#include "kernels/lora_linear.h"

namespace kernels {

// An operand in T or float, at any stride and offset.
template <class T>
struct Stored {
  Matrix<float> exact;  // the stored values
  int64_t row_stride, column_stride;
  int offset;
  FloatOrHalf<T> numbers;
  std::unique_ptr<GlobalBuffer<T>> source;

  Stored(int rows, int columns, bool in_float, bool transposed, bool aligned, Numbers kind,
         double size, Random& random, const char* name)
      : exact(random_matrix<float>(rows, columns, columns, kind, random)),
        row_stride(transposed ? 1
                   : aligned  ? padded(columns)
                              : columns + 3),
        column_stride(transposed ? rows : 1),
        offset(aligned ? 0 : 1),
        numbers(1 + at(rows - 1, columns - 1), in_float, name) {
    numbers.floats.fill(NAN), numbers.halves.fill(from_double<T>(NAN));
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        float& value = exact.at(i, j);
        if (kind == Numbers::Reals) value *= static_cast<float>(size);
        if (in_float) {
          numbers.floats[at(i, j)] = value;
        } else {
          numbers.halves[at(i, j)] = from_double<T>(value);
          value = static_cast<float>(numbers[at(i, j)]);
        }
      }
    }
  }
  size_t at(int i, int j) const {
    return static_cast<size_t>(offset + i * row_stride + j * column_stride);
  }
  const void* data() const {
    return numbers.in_float ? static_cast<const void*>(numbers.floats.data() + offset)
                            : static_cast<const void*>(numbers.halves.data() + offset);
  }
  // Written by a kernel, by ordinary stores, rather than by the host.
  void is_written_on(emulator::Stream& stream) {
    GlobalBuffer<T>& halves = numbers.halves;
    if (source == nullptr) {
      source = std::make_unique<GlobalBuffer<T>>(halves.to_vector(), "source");
      halves.fill(from_double<T>(NAN));
    }
    stream.launch({.grid = dim3(2), .block = dim3(256)}, copy<T>,
                  static_cast<const T*>(source->data()), halves.data(),
                  static_cast<int>(halves.size()));
  }
  lora_ext::kernel::Matrix matrix() const { return {data(), row_stride, column_stride}; }
  bool aligned() const {  // as kernels ask for it
    return column_stride == 1 && row_stride % 8 == 0 && offset == 0;
  }
};

}  // namespace kernels
