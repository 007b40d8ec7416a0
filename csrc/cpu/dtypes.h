// Element types of the CPU kernels of 16 and 8 bits, torch-free, with scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace lora_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// e4m3: 4 bits of exponent, whose bias is 7, and 3 of mantissa; no infinity (OCP 8-bit floating
// point, 2023).
struct Float8 {
  uint8_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // exact
  return bits_to_float(sign | float_to_bits(subnormal));
}

inline float to_float(Float8 value) {
  const uint32_t sign = uint32_t{value.bits & 0x80u} << 24;
  const uint32_t magnitude = value.bits & 0x7Fu;
  if (magnitude == 0x7Fu) return bits_to_float(sign | 0x7FC00000u);
  if (magnitude >= 8) return bits_to_float(sign | ((magnitude << 20) + (120u << 23)));
  return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-9f));
}

inline float to_float(int8_t value) { return static_cast<float>(value); }

inline void from_float(float value, float* out) { *out = value; }

// Round to nearest even; every NaN becomes the quiet NaN that torch writes.
inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    out->bits = 0x7FC0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    out->bits = sign | 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or beyond
    out->bits = sign | 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at 2^-24
    const float rounded = bits_to_float(magnitude) + 0.5f;
    out->bits = sign | static_cast<uint16_t>(float_to_bits(rounded) - 0x3F000000u);
  } else {
    const uint32_t rebased = magnitude - (112u << 23);
    out->bits = sign | static_cast<uint16_t>((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13);
  }
}

}  // namespace lora_ext::cpu
