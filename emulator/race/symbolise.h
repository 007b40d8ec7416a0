// Source positions of code addresses, for reports.
#pragma once

#include <string>
#include <vector>

namespace emulator::race {

// "function at file:line" of the innermost of these calls that is kernel code, neither the layer's
// nor csrc/ptx's; without addr2line or debug information, "binary+offset". `frames` are return
// addresses, innermost first, and may end in null.
std::string kernel_position(std::vector<const void*> frames);

}  // namespace emulator::race
