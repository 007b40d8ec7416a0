// The 16-bit floating-point formats: exact conversion to float, and rounding to nearest even back.
#pragma once

#include <bit>
#include <cstdint>

// The types of cuda_bf16.h and cuda_fp16.h, here by name only: their headers take a second to
// compile.
struct __nv_bfloat16;
struct __half;

namespace emulator {

enum class Format { kBFloat16, kFloat16 };

template <typename T>
constexpr Format format_of();
template <>
constexpr Format format_of<__nv_bfloat16>() {
  return Format::kBFloat16;
}
template <>
constexpr Format format_of<__half>() {
  return Format::kFloat16;
}

constexpr float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;  // CUDA's canonical NaN
  // Just under half of a unit in the last place, and the rest of it if the kept part is odd.
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// Without a branch, so that loops over it become vector code: operands of a tensor core are widened
// here.
constexpr float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu)
                                                                                 << 13;
  // The exponent's bias is 15 there and 127 here. The product is exact for subnormals too.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t infinity_or_nan = magnitude >= 0x0F800000u ? 0x7F800000u : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinity_or_nan | sign);
}

constexpr uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7FFF;  // CUDA's canonical NaN
  // From 65520 on, halfway between the largest finite number and 2^16, the result is infinite.
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return static_cast<uint16_t>(sign);  // below 2^-25
    const uint32_t significand = (magnitude & 0x7FFFFFu) | 0x800000u, shift = 126 - exponent;
    const uint32_t kept = significand >> shift, rest = significand & ((1u << shift) - 1);
    const uint32_t half = 1u << (shift - 1);
    const uint32_t up = rest > half || (rest == half && (kept & 1) != 0);
    return static_cast<uint16_t>(sign | (kept + up));
  }
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xFFFu + (rebiased >> 13 & 1)) >> 13);
}

constexpr float to_float(Format format, uint16_t bits) {
  return format == Format::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

constexpr uint16_t from_float(Format format, float value) {
  return format == Format::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

}  // namespace emulator
