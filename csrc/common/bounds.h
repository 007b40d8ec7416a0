// Limits of the op that checks and kernels share.
#pragma once

#include <cstdint>

namespace lora_ext {

constexpr int64_t kMaxRank = 512;  // sizes buffers on the stack of the CPU kernels
// Size of the wide copies that exist at a time in the library route, except on the CPU. A GPU takes
// a tenth of a millisecond or more to read or write this much, many times the cost of a launch.
constexpr int64_t kWideBlockBytes = int64_t{1} << 28;

}  // namespace lora_ext
