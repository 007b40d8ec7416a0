// Swizzles, tensor maps, matrix descriptors and the arithmetic of wgmma, against plain formulas
// that place one element at a time. No kernel is launched.
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "emulator/copies/tensor_map.h"
#include "emulator/machine/fail.h"
#include "emulator/matrix/descriptor.h"
#include "emulator/matrix/wgmma_arithmetic.h"
#include "emulator/selftests/selftest.h"
#include "emulator/selftests/sm90_descriptor.h"

namespace {

using namespace emulator;
using selftest::descriptor_bits;

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

// The 16-byte chunk at which chunk `chunk` of line `line` lies within that line, as the figures of
// the PTX ISA draw it: lines of 128 bytes in memory, so several narrow lines share a permutation.
uint32_t drawn_chunk(uint32_t line, uint32_t chunk, Swizzle mode) {
  switch (mode) {
    case Swizzle::k32:
      return chunk ^ (line / 4 % 2);
    case Swizzle::k64:
      return chunk ^ (line / 2 % 4);
    case Swizzle::k128:
      return chunk ^ (line % 8);
    default:
      return chunk;
  }
}

TEST(swizzle_permutes_chunks_as_drawn) {
  for (Swizzle mode : kSwizzles) {
    if (mode == Swizzle::kNone) continue;
    const uint32_t width = swizzle_width(mode);
    for (uint32_t tile : {0u, 1024u, 0x8400u}) {
      for (uint32_t line = 0; line < 16; ++line) {
        for (uint32_t chunk = 0; chunk < width / 16; ++chunk) {
          CHECK(swizzle(tile + line * width + chunk * 16 + 5, mode) ==
                tile + line * width + drawn_chunk(line, chunk, mode) * 16 + 5);
        }
      }
    }
  }
  CHECK(swizzle(0x1234, Swizzle::kNone) == 0x1234);
}

// An operand of `rows` x 16 in a buffer, placed element by element.
struct PlacedOperand {
  uint64_t descriptor;
  std::vector<uint16_t> memory;  // of the block's shared memory
};

PlacedOperand place(const std::vector<uint16_t>& matrix /* [rows][16] */, uint32_t rows,
                    Major major, Swizzle mode) {
  const uint32_t start = 2048, width = swizzle_width(mode), period = 1024;
  std::vector<uint16_t> memory(128 * 1024 / 2, 0x7FC1);  // NaN in both formats
  uint32_t leading = 0, stride = 0;
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t k = 0; k < 16; ++k) {
      uint32_t at;
      if (mode == Swizzle::kNone) {  // core matrices of 8 lines of 16 bytes
        const uint32_t line = major == Major::kK ? row % 8 : k % 8;
        const uint32_t within = major == Major::kK ? k % 8 : row % 8;
        const uint32_t along_k = 272, along_rows = 2 * 272 + 16;
        at = start + k / 8 * along_k + row / 8 * along_rows + line * 16 + within * 2;
        leading = along_k, stride = along_rows;
      } else if (major == Major::kK) {  // k in the first 32 bytes of each row
        stride = 2 * period;
        at = start + row / 8 * stride + row % 8 * width + drawn_chunk(row % 8, k / 8, mode) * 16 +
             k % 8 * 2;
        leading = 16;
      } else {  // lines of `width` bytes along the rows
        const uint32_t per_line = width / 2;
        leading = 4 * period, stride = 2 * period;
        at = start + row / per_line * leading + k / 8 * stride + k % 8 * width +
             drawn_chunk(k % 8, row % per_line / 8, mode) * 16 + row % 8 * 2;
      }
      memory[at / 2] = matrix[row * 16 + k];
    }
  }
  return {descriptor_bits(start, leading, stride, mode), memory};
}

std::vector<uint16_t> random_operand(std::mt19937& rng, size_t count, Format format) {
  std::uniform_real_distribution<float> uniform(-2, 2);
  std::vector<uint16_t> out(count);
  for (uint16_t& bits : out) bits = from_float(format, uniform(rng));
  return out;
}

TEST(descriptor_finds_each_element) {
  std::mt19937 rng(1);
  for (Swizzle mode : kSwizzles) {
    for (Major major : {Major::kK, Major::kMN}) {
      for (uint32_t rows : {8u, 64u, 72u, 256u}) {
        const auto matrix = random_operand(rng, rows * 16, Format::kFloat16);
        if (mode == Swizzle::kNone && rows == 256 && major == Major::kK) continue;
        const PlacedOperand placed = place(matrix, rows, major, mode);
        const MatrixDescriptor d = decode_descriptor(placed.descriptor);
        CHECK(descriptor_fault(d, major, rows) == "");
        for (uint32_t row = 0; row < rows; ++row) {
          for (uint32_t k = 0; k < 16; ++k) {
            CHECK(placed.memory[element_address(d, major, row, k) / 2] == matrix[row * 16 + k]);
          }
        }
      }
    }
  }
}

TEST(descriptor_advances_along_k_within_a_swizzled_row) {
  // 64 elements of K in rows of 128 bytes: each k16 step starts 32 bytes further.
  for (uint32_t step = 0; step < 4; ++step) {
    const auto d = decode_descriptor(descriptor_bits(1024 + step * 32, 16, 1024, Swizzle::k128));
    CHECK(descriptor_fault(d, Major::kK, 64) == "");
    for (uint32_t row = 0; row < 64; ++row) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t column = step * 16 + k;
        CHECK(element_address(d, Major::kK, row, k) ==
              1024 + row * 128 + drawn_chunk(row, column / 8, Swizzle::k128) * 16 + column % 8 * 2);
      }
    }
  }
}

TEST(descriptor_faults) {
  const auto fault = [](uint64_t bits, Major major, uint32_t rows) {
    return descriptor_fault(decode_descriptor(bits), major, rows);
  };
  const uint64_t good = descriptor_bits(1024, 16, 1024, Swizzle::k128);
  CHECK(fault(good, Major::kK, 64) == "");
  CHECK(fault(good | 1ull << 15, Major::kK, 64) != "");
  CHECK(fault(good | 1ull << 60, Major::kK, 64) != "");
  CHECK(fault(good | 1ull << 49, Major::kK, 64) != "");
  CHECK(fault(descriptor_bits(1024 + 128, 16, 1024, Swizzle::k128), Major::kK, 64) != "");
  CHECK(fault(descriptor_bits(1024 + 112, 16, 1024, Swizzle::k128), Major::kK, 64) != "");
  CHECK(fault(descriptor_bits(1024, 16, 512, Swizzle::k128), Major::kK, 64) != "");
  CHECK(fault(descriptor_bits(1024, 16, 512, Swizzle::k64), Major::kK, 64) == "");
  CHECK(fault(descriptor_bits(1024, 16, 512, Swizzle::k128), Major::kK, 8) == "");
  CHECK(fault(descriptor_bits(1024, 8192, 1024, Swizzle::k128), Major::kMN, 256) == "");
  CHECK(fault(descriptor_bits(1024, 16, 1024, Swizzle::k128), Major::kMN, 256) != "");
  CHECK(fault(descriptor_bits(1024, 16, 1024, Swizzle::k128), Major::kMN, 64) == "");
  CHECK(fault(descriptor_bits(1024 + 64, 8192, 1024, Swizzle::k128), Major::kMN, 64) != "");
  CHECK(fault(descriptor_bits(1024 + 64, 8192, 1024, Swizzle::k128), Major::kMN, 32) == "");
}

TEST(wgmma_arithmetic_agrees_with_double) {
  std::mt19937 rng(2);
  std::uniform_real_distribution<float> uniform(-2, 2);
  for (Format format : {Format::kBFloat16, Format::kFloat16}) {
    for (int n = 8; n <= kMaxN; n += 8) {
      const auto a = random_operand(rng, 16 * 16, format);
      const auto b = random_operand(rng, size_t(n) * 16, format);
      std::vector<float> a_values(16 * 16), b_values(16 * n), d(16 * n);
      for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) a_values[k * 16 + row] = to_float(format, a[row * 16 + k]);
      for (Swizzle mode : kSwizzles) {
        const PlacedOperand placed = place(b, n, Major::kMN, mode);
        const auto* bytes = reinterpret_cast<const uint8_t*>(placed.memory.data());
        read_operand(
            decode_descriptor(placed.descriptor), Major::kMN, format, 0, n,
            [&](uint32_t address) { return bytes + address; }, b_values.data());
        for (float& value : d) value = uniform(rng);
        const std::vector<float> before = d;
        multiply_accumulate(a_values.data(), b_values.data(), d.data(), n);
        for (int row = 0; row < 16; ++row) {
          for (int col = 0; col < n; ++col) {
            double expected = before[row * n + col], magnitude = std::abs(expected);
            for (int k = 0; k < 16; ++k) {
              const double product = double(to_float(format, a[row * 16 + k])) *
                                     double(to_float(format, b[col * 16 + k]));
              expected += product;
              magnitude += std::abs(product);
            }
            CHECK(std::abs(d[row * n + col] - expected) <= 17 * 0x1p-24 * magnitude);
          }
        }
      }
    }
  }
}

// ---- tensor maps --------------------------------------------------------------------------------

// The arguments of a valid map, each to be spoiled in turn.
struct MapArguments {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint32_t rank = 2;
  void* address = nullptr;
  cuuint64_t dim[2] = {100, 50};
  cuuint64_t strides[1] = {208};
  cuuint32_t box[2] = {64, 32};
  cuuint32_t element_strides[2] = {1, 1};
  CUtensorMapInterleave interleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  CUtensorMapFloatOOBfill fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;

  CUresult encode(CUtensorMap* map) const {
    return encode_tensor_map_tiled(map, type, rank, address, dim, strides, box, element_strides,
                                   interleave, swizzle, promotion, fill);
  }
};

TEST(tensor_map_round_trip) {
  alignas(64) static uint8_t memory[208 * 50];
  MapArguments arguments;
  arguments.address = memory;
  CUtensorMap encoded;
  CHECK(arguments.encode(&encoded) == CUDA_SUCCESS);
  CHECK(std::string(tensor_map_error()) == "");
  const TensorMap map = decode_tensor_map(&encoded, "selftest");
  CHECK(map.base == memory && map.width == 100 && map.height == 50 && map.pitch == 208);
  CHECK(map.box_width == 64 && map.box_height == 32 && map.element_bytes == 2);
  CHECK(map.swizzle == Swizzle::k128 && map.box_bytes() == 64 * 32 * 2);
}

TEST(tensor_map_requirements) {
  alignas(64) static uint8_t memory[208 * 50];
  using Spoil = std::function<void(MapArguments&)>;
  const auto result_of = [](const Spoil& spoil) {
    MapArguments arguments;
    arguments.address = memory;
    spoil(arguments);
    CUtensorMap map;
    const CUresult result = arguments.encode(&map);
    CHECK((result == CUDA_SUCCESS) == (tensor_map_error()[0] == '\0'));
    return result;
  };
  const Spoil invalid[] = {
      [](MapArguments& a) { a.rank = 0; },
      [](MapArguments& a) { a.rank = 6; },
      [](MapArguments& a) { a.interleave = CU_TENSOR_MAP_INTERLEAVE_16B; },
      [](MapArguments& a) { a.address = nullptr; },
      [](MapArguments& a) { a.address = memory + 8; },
      [](MapArguments& a) { a.dim[0] = 0; },
      [](MapArguments& a) { a.dim[1] = 0; },
      [](MapArguments& a) { a.dim[1] = (uint64_t{1} << 32) + 1; },
      [](MapArguments& a) { a.strides[0] = 200; },
      [](MapArguments& a) { a.strides[0] = 192; },
      [](MapArguments& a) { a.strides[0] = uint64_t{1} << 40; },
      [](MapArguments& a) { a.box[0] = 0; },
      [](MapArguments& a) { a.box[1] = 257; },
      [](MapArguments& a) { a.box[0] = 60; },
      [](MapArguments& a) { a.box[0] = 72; },
      [](MapArguments& a) { a.swizzle = CU_TENSOR_MAP_SWIZZLE_64B; },
      [](MapArguments& a) { a.element_strides[0] = 0; },
      [](MapArguments& a) { a.element_strides[1] = 9; },
      [](MapArguments& a) {
        a.type = CU_TENSOR_MAP_DATA_TYPE_UINT16;
        a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
      },
  };
  for (const Spoil& spoil : invalid) CHECK(result_of(spoil) == CUDA_ERROR_INVALID_VALUE);

  const Spoil unsupported[] = {
      [](MapArguments& a) { a.rank = 3; },
      [](MapArguments& a) { a.type = CU_TENSOR_MAP_DATA_TYPE_TFLOAT32; },
      [](MapArguments& a) { a.element_strides[1] = 2; },
      [](MapArguments& a) { a.swizzle = CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B; },
      [](MapArguments& a) { a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA; },
  };
  for (const Spoil& spoil : unsupported) CHECK(result_of(spoil) == CUDA_ERROR_NOT_SUPPORTED);

  const Spoil valid[] = {
      [](MapArguments&) {},
      [](MapArguments& a) { a.element_strides[0] = 2; },  // ignored without interleave
      [](MapArguments& a) { a.box[0] = 32; },             // narrower than the swizzle
      [](MapArguments& a) { a.dim[1] = uint64_t{1} << 32; },
      [](MapArguments& a) {
        a.box[0] = 256;
        a.swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
      },
  };
  for (const Spoil& spoil : valid) CHECK(result_of(spoil) == CUDA_SUCCESS);

  alignas(64) uint8_t misaligned[sizeof(CUtensorMap) + 64];
  MapArguments arguments;
  arguments.address = memory;
  CHECK(arguments.encode(reinterpret_cast<CUtensorMap*>(misaligned + 16)) ==
        CUDA_ERROR_INVALID_VALUE);
}

TEST(tensor_map_contents_are_checked) {
  alignas(64) static uint8_t memory[208 * 50];
  MapArguments arguments;
  arguments.address = memory;
  CUtensorMap map{};
  CHECK_FAILS(ErrorKind::Misuse, "holds no tensor map", decode_tensor_map(&map, "selftest"));
  CHECK(arguments.encode(&map) == CUDA_SUCCESS);
  map.opaque[2] += 1;
  CHECK_FAILS(ErrorKind::Misuse, "holds no tensor map", decode_tensor_map(&map, "selftest"));
  CHECK_FAILS(ErrorKind::Misuse, "64-byte aligned", decode_tensor_map(nullptr, "selftest"));
}

}  // namespace
