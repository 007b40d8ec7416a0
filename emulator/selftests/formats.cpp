// Conversions of bf16 and fp16: every 16-bit pattern, and floats around every rounding boundary,
// against CUDA's headers.
#include "emulator/matrix/formats.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "emulator/machine/config.h"
#include "emulator/selftests/selftest.h"

namespace {

using namespace emulator;

bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

__nv_bfloat16 bfloat16_of(uint16_t bits) { return __nv_bfloat16(__nv_bfloat16_raw{bits}); }
__half float16_of(uint16_t bits) { return __half(__half_raw{bits}); }

bool rounds_like_cuda(float value) {
  return float_to_bfloat16(value) == __nv_bfloat16_raw(__float2bfloat16(value)).x &&
         float_to_float16(value) == __half_raw(__float2half(value)).x;
}

TEST(every_pattern_widens_like_cuda) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    CHECK(same(bfloat16_to_float(bits), __bfloat162float(bfloat16_of(bits))));
    CHECK(same(float16_to_float(bits), __half2float(float16_of(bits))));
  }
}

TEST(every_pattern_survives_the_way_to_float_and_back) {
  for (Format format : {Format::kBFloat16, Format::kFloat16}) {
    for (uint32_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const float value = to_float(format, bits);
      CHECK(std::isnan(value) ? from_float(format, value) == 0x7FFF
                              : from_float(format, value) == bits);
    }
  }
}

// Halfway between neighbours, and one float to either side of it.
TEST(rounding_boundaries_are_cudas) {
  for (Format format : {Format::kBFloat16, Format::kFloat16}) {
    const uint32_t infinity = format == Format::kBFloat16 ? 0x7F80 : 0x7C00;
    for (uint32_t i = 0; i < infinity; ++i) {
      const float low = to_float(format, static_cast<uint16_t>(i));
      const float high = to_float(format, static_cast<uint16_t>(i + 1));
      const double top = std::isinf(high) ? 2.0 * low - to_float(format, uint16_t(i - 1)) : high;
      const auto middle = static_cast<float>((double{low} + top) / 2);
      for (float value : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, INFINITY)}) {
        CHECK(rounds_like_cuda(value) && rounds_like_cuda(-value));
      }
    }
  }
}

TEST(random_floats_round_like_cuda) {
  Rng rng(7);
  for (int i = 0; i < 1'000'000; ++i) CHECK(rounds_like_cuda(std::bit_cast<float>(rng())));
}

TEST(the_type_chooses_the_format) {
  static_assert(format_of<__nv_bfloat16>() == Format::kBFloat16);
  static_assert(format_of<__half>() == Format::kFloat16);
}

}  // namespace
