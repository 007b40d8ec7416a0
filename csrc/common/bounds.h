// Limits of the op that checks and kernels share.
#pragma once

#include <cstdint>

namespace lora_ext {

constexpr int64_t kMaxRank = 512;  // sizes buffers on the stack of the CPU kernels
// Of the wide copies that the library route makes at a time, other than on the CPU: a GPU takes a
// tenth of a millisecond or more to read or write as much, many times what a launch costs.
constexpr int64_t kWideBlockBytes = int64_t{1} << 28;

}  // namespace lora_ext
