// Turns a wild access of a kernel (a null pointer, the page after a buffer, the end of a fiber's
// stack) into an Error that names the thread. Without it the process would die of a signal. Under
// AddressSanitizer that library's report takes its place.
#pragma once
#include <signal.h>

namespace emulator {

/// In force while it exists.
class MemoryFaultHandler {
 public:
  MemoryFaultHandler();
  ~MemoryFaultHandler();
  MemoryFaultHandler(const MemoryFaultHandler&) = delete;
  MemoryFaultHandler& operator=(const MemoryFaultHandler&) = delete;

 private:
  struct sigaction before_ = {};
  stack_t stack_before_ = {};
};

}  // namespace emulator
