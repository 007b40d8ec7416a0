// Swizzles, faults of matrix descriptors, and tensor maps. No kernel is launched: sm90_wgmma.cpp
// finds elements by descriptors.
#include <functional>

#include "emulator/copies/tensor_map.h"
#include "emulator/matrix/descriptor.h"
#include "emulator/selftests/selftest.h"
#include "emulator/selftests/sm90_descriptor.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

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

// ---- tensor maps --------------------------------------------------------------------------------

alignas(64) uint8_t memory[208 * 50];

// The arguments of a valid map, each to be spoiled in turn.
struct MapArguments {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint32_t rank = 2;
  void* address = memory;
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
  CUtensorMap encoded;
  CHECK(MapArguments{}.encode(&encoded) == CUDA_SUCCESS);
  CHECK(std::string(tensor_map_error()) == "");
  const TensorMap map = decode_tensor_map(&encoded, "selftest");
  CHECK(map.base == memory && map.width == 100 && map.height == 50 && map.pitch == 208);
  CHECK(map.box_width == 64 && map.box_height == 32 && map.element_bytes == 2);
  CHECK(map.swizzle == Swizzle::k128 && map.box_bytes() == 64 * 32 * 2);
}

TEST(tensor_map_requirements) {
  using Spoil = std::function<void(MapArguments&)>;
  const auto result_of = [](const Spoil& spoil) {
    MapArguments arguments;
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
  CHECK(MapArguments{}.encode(reinterpret_cast<CUtensorMap*>(misaligned + 16)) ==
        CUDA_ERROR_INVALID_VALUE);
}

TEST(tensor_map_contents_are_checked) {
  CUtensorMap map{};
  CHECK_FAILS(ErrorKind::Misuse, "holds no tensor map", decode_tensor_map(&map, "selftest"));
  CHECK(MapArguments{}.encode(&map) == CUDA_SUCCESS);
  map.opaque[2] += 1;
  CHECK_FAILS(ErrorKind::Misuse, "holds no tensor map", decode_tensor_map(&map, "selftest"));
  CHECK_FAILS(ErrorKind::Misuse, "64-byte aligned", decode_tensor_map(nullptr, "selftest"));
}

}  // namespace
