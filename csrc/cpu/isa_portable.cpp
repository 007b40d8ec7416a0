// The skinny passes in GCC/Clang vector extensions: any processor, 128-bit registers assumed.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/dequantize.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {
namespace {

#include "cpu/simd_dropout.h"
// clang-format off
#include "cpu/wgrad_store.h"
#include "cpu/simd_packs.h"
#include "cpu/simd_passes.h"
#include "cpu/simd_few_rows.h"
#include "cpu/simd_dequantize.h"
// clang-format on

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kDropoutWords = 1;

  static Vec zero() { return Vec{}; }
  static Vec broadcast(float value) { return Vec{value, value, value, value}; }
  static Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T>
  static Vec load(const T* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static Vec load(const int8_t* p) {
    return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
               static_cast<float>(p[3])};
  }
  static Vec load(const Float8* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  struct Table {
    const float* values;
    bool low_first;
    Table(const float* values_, bool low_first_) : values(values_), low_first(low_first_) {}
  };
  static Vec lookup(const Table& table, const uint8_t* codes) {
    const int first = table.low_first ? 0 : 4, second = 4 - first;
    const auto value = [&](int i, int shift) { return table.values[codes[i] >> shift & 15]; };
    return Vec{value(0, first), value(0, second), value(1, first), value(1, second)};
  }
  // Loads the first `count` elements, and zeros.
  template <class T>
  static Vec load_first(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(p[i]);
    return load(values);
  }
  static void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  template <class T>
  static void store(T* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
  }
  static void transpose(Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = i + 1; j < kLanes; ++j) {
        const float below = rows[j][i];
        rows[j][i] = rows[i][j];
        rows[i][j] = below;
      }
    }
  }
  template <class T>
  static void load_transposed(const T* in, int64_t pitch, Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * pitch);
    transpose(rows);
  }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec multiply(Vec a, Vec b) { return a * b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec keep(Vec v, uint32_t bits) {
    for (int i = 0; i < kLanes; ++i) v[i] = (bits >> i & 1u) != 0 ? v[i] : 0.0f;
    return v;
  }

  static void dropout_words(const uint64_t* products, const DropoutRow& row,
                            const DropoutKeys& keys, uint32_t keep_count, uint32_t* words) {
    uint32_t bits = 0;
    for (int q = 0; q < 4; ++q) {
      const philox::Words draws = dropout_draw(products[q], row, keys);
      for (int j = 0; j < 4; ++j) {
        bits |= uint32_t{(draws.w[j] & 0xFFFFu) < keep_count} << (8 * j + 2 * q);
        bits |= uint32_t{(draws.w[j] >> 16) < keep_count} << (8 * j + 2 * q + 1);
      }
    }
    *words = bits;
  }
};

constexpr SkinnyKernels kKernels = make_kernels<Portable>("portable");
constexpr DequantizeKernels kDequantize = make_dequantize<Portable>();

}  // namespace

const SkinnyKernels* portable_kernels() { return &kKernels; }
const DequantizeKernels* portable_dequantize() { return &kDequantize; }

}  // namespace lora_ext::cpu
