// The counts of lora_decode on the device: zero whenever a launch begins, and left at zero, so that
// a call needs no launch of its own to clear them.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace lora_ext::kernel_launch {

// So many for one launch on the current stream. Calls of one stream follow each other and share
// theirs; a launch that is being captured gets its own for good, since replays of different graphs
// may run side by side. nullptr where there are none left: then they lie in the call's workspace,
// and are cleared before.
uint32_t* decode_counts(const at::Device& device, int64_t count);

}  // namespace lora_ext::kernel_launch
