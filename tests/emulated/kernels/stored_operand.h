// An operand of the whole LoRA linear: a half or float matrix as it lies in global memory.
#pragma once
#include <memory>

#include "emulated/kernels/neighbours.h"
#include "emulated/kernels/reference.h"
#include "kernel/lora_linear.h"

namespace kernels {

extern NEIGHBOUR_COPY(__nv_bfloat16);
extern NEIGHBOUR_COPY(__half);

// An operand in T or float, at any stride and offset.
template <class T>
struct Stored {
  kernels::Matrix<float> exact;  // what is stored
  bool in_float;
  int64_t row_stride, column_stride;
  int offset;
  emulator::GlobalBuffer<float> floats;
  emulator::GlobalBuffer<T> halves;
  std::unique_ptr<emulator::GlobalBuffer<T>> source;

  Stored(int rows, int columns, bool in_float_, bool transposed, bool aligned,
         kernels::Numbers numbers, double size, std::mt19937_64& random, const char* name)
      : exact(kernels::random_matrix<float>(rows, columns, columns, numbers, random)),
        in_float(in_float_),
        row_stride(transposed ? 1
                   : aligned  ? kernels::padded(columns)
                              : columns + 3),
        column_stride(transposed ? rows : 1),
        offset(aligned ? 0 : 1),
        floats(in_float ? extent(rows, columns) : 0, name),
        halves(in_float ? 0 : extent(rows, columns), name) {
    if (in_float) {
      floats.fill(NAN);
    } else {
      halves.fill(kernels::from_double<T>(NAN));
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        float& value = exact.at(i, j);
        if (numbers == kernels::Numbers::Reals) value *= static_cast<float>(size);
        const size_t at = static_cast<size_t>(offset + i * row_stride + j * column_stride);
        if (in_float) {
          floats[at] = value;
        } else {
          halves[at] = kernels::from_double<T>(value);
          value = static_cast<float>(kernels::to_double(halves[at]));
        }
      }
    }
  }
  size_t extent(int rows, int columns) const {
    return static_cast<size_t>(offset + (rows - 1) * row_stride + (columns - 1) * column_stride +
                               1);
  }
  const void* data() const {
    return in_float ? static_cast<const void*>(floats.data() + offset)
                    : static_cast<const void*>(halves.data() + offset);
  }
  // A kernel writes it, by ordinary stores, rather than the host.
  void is_written_on(emulator::Stream& stream) {
    if (source == nullptr) {
      source = std::make_unique<emulator::GlobalBuffer<T>>(halves.to_vector(), "source");
      halves.fill(kernels::from_double<T>(NAN));
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
