// The counters of lora_decode on the device. They are zero when a launch begins and are left at
// zero, so that a call needs no extra launch to clear them.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace lora_ext::kernel_launch {

// `count` counters for one launch on the current stream. Calls on one stream run one after the
// other and share their counters. A launch that is captured gets counters of its own permanently,
// since replays of different graphs may run concurrently. Returns nullptr if none are left: the
// counters are then in the call's workspace and are cleared before the launch.
uint32_t* decode_counts(const at::Device& device, int64_t count);

}  // namespace lora_ext::kernel_launch
