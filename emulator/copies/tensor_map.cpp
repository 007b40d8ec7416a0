// See tensor_map.h. The requirements are those of the CUDA driver API, "Tensor Map Object
// Management".
#include "emulator/copies/tensor_map.h"

#include <cstring>

#include "emulator/machine/fail.h"

namespace emulator {
namespace {

constexpr uint64_t kMagic = 0x70616D726F736E74;  // "tnsormap"
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

thread_local const char* last_error = "";

CUresult refuse(CUresult code, const char* reason) {
  last_error = reason;
  return code;
}

struct ElementType {
  CUtensorMapDataType type;
  uint32_t bytes;
  bool is_float;
};

constexpr ElementType kElementTypes[] = {
    {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, false},  {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, false},
    {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, false}, {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, false},
    {CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, false}, {CU_TENSOR_MAP_DATA_TYPE_INT64, 8, false},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, true}, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, true},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, true}, {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, true},
};

const ElementType* find_element_type(CUtensorMapDataType type) {
  for (const ElementType& known : kElementTypes) {
    if (known.type == type) return &known;
  }
  return nullptr;
}

// FNV-1a over everything before the checksum. TensorMap has no padding there.
uint64_t checksum(const TensorMap& map) {
  static_assert(offsetof(TensorMap, checksum) == 5 * 8 + 4 * 4);
  unsigned char bytes[offsetof(TensorMap, checksum)];
  std::memcpy(bytes, &map, sizeof bytes);
  uint64_t hash = 0xCBF29CE484222325;
  for (unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001B3;
  return hash;
}

}  // namespace

CUresult encode_tensor_map_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* global_address, const cuuint64_t* global_dim,
                                 const cuuint64_t* global_strides, const cuuint32_t* box_dim,
                                 const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion l2_promotion,
                                 CUtensorMapFloatOOBfill out_of_bound_fill) {
  const auto invalid = [](const char* reason) { return refuse(CUDA_ERROR_INVALID_VALUE, reason); };
  const auto unsupported = [](const char* reason) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, reason);
  };

  if (!map || !global_address || !global_dim || !box_dim || !element_strides) {
    return invalid("a pointer is null");
  }
  if (reinterpret_cast<uintptr_t>(map) % 64) return invalid("tensorMap is not 64-byte aligned");
  if (rank == 0 || rank > 5) return invalid("tensorRank is not in 1..5");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE && rank < 3) {
    return invalid("an interleaved layout needs tensorRank >= 3");
  }
  if (rank != 2) return unsupported("this layer runs tensorRank 2 only");
  if (!global_strides) return invalid("globalStrides is null");

  const ElementType* element = find_element_type(type);
  if (!element) return unsupported("tensorDataType rounds, flushes or packs; use a plain type");
  if (reinterpret_cast<uintptr_t>(global_address) % 16) {
    return invalid("globalAddress is not 16-byte aligned");
  }
  for (int i = 0; i < 2; ++i) {
    if (global_dim[i] == 0 || global_dim[i] > uint64_t{1} << 32) {
      return invalid("globalDim is not in 1..2^32");
    }
    if (box_dim[i] == 0 || box_dim[i] > 256) return invalid("boxDim is not in 1..256");
    if (element_strides[i] == 0 || element_strides[i] > 8) {
      return invalid("elementStrides is not in 1..8");
    }
  }
  if (element_strides[1] != 1) return unsupported("this layer runs elementStrides 1 only");
  if (global_strides[0] % 16) return invalid("globalStrides is not a multiple of 16 bytes");
  if (global_strides[0] >= uint64_t{1} << 40) return invalid("globalStrides is not below 2^40");
  if (global_strides[0] < global_dim[0] * element->bytes) {
    return invalid("globalStrides is shorter than a row of globalDim[0] elements");
  }

  const uint32_t row_bytes = box_dim[0] * element->bytes;
  if (row_bytes % 16) return invalid("the inner box extent is not a multiple of 16 bytes");
  if (swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) {
    return unsupported("this layer runs the swizzles none, 32B, 64B and 128B only");
  }
  const auto mode = static_cast<Swizzle>(swizzle);
  if (mode != Swizzle::kNone && row_bytes > swizzle_width(mode)) {
    return invalid("the inner box extent is wider than the swizzle");
  }
  if (l2_promotion < CU_TENSOR_MAP_L2_PROMOTION_NONE ||
      l2_promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    return invalid("l2Promotion is unknown");
  }
  if (out_of_bound_fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    if (!element->is_float) return invalid("oobFill with NaN needs a floating-point type");
    return unsupported("this layer fills with zeros only");
  }

  TensorMap contents{kMagic,
                     static_cast<uint8_t*>(global_address),
                     global_dim[0],
                     global_dim[1],
                     global_strides[0],
                     box_dim[0],
                     box_dim[1],
                     element->bytes,
                     mode,
                     0};
  contents.checksum = checksum(contents);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &contents, sizeof contents);
  last_error = "";
  return CUDA_SUCCESS;
}

const char* tensor_map_error() { return last_error; }

TensorMap decode_tensor_map(const CUtensorMap* map, const char* instruction) {
  const auto address = reinterpret_cast<uintptr_t>(map);
  if (!map || address % 64) {
    fail(ErrorKind::Misuse, "%s: the tensor map at %p is not 64-byte aligned", instruction,
         static_cast<const void*>(map));
  }
  TensorMap contents;
  std::memcpy(&contents, map, sizeof contents);
  if (contents.magic != kMagic || contents.checksum != checksum(contents)) {
    fail(ErrorKind::Misuse,
         "%s: %p holds no tensor map (never encoded, or overwritten); fill it with "
         "encode_tensor_map_tiled and pass it as a const __grid_constant__ parameter",
         instruction, static_cast<const void*>(map));
  }
  return contents;
}

}  // namespace emulator
