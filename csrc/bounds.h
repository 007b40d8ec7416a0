// Limits of the op that checks and kernels share.
#pragma once

#include <cstdint>

namespace lora_ext {

constexpr int64_t kMaxRank = 512;  // sizes buffers on the stack of the CPU kernels

}  // namespace lora_ext
