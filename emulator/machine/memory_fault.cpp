// The handler of SIGSEGV while a launch runs.
#include "emulator/machine/memory_fault.h"

#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)

MemoryFaultHandler::MemoryFaultHandler() = default;
MemoryFaultHandler::~MemoryFaultHandler() = default;

#else

namespace {

// A stack for the handler: that of the fiber may be what has run out.
alignas(64) unsigned char g_handler_stack[128 * 1024];

std::string place_of(const unsigned char* address) {
  constexpr size_t kNearby = 64 * 1024;
  const Thread& thread = *machine().current;
  const FiberStack& stack = thread.stack;
  if (address < stack.bottom && address + kNearby > stack.bottom) {
    return format("the stack of %zu bytes has overflowed: raise Config::stack_bytes", stack.bytes);
  }
  const Block& block = thread.block();
  if (address + kNearby > block.shared && address < block.shared + block.shared_bytes + kNearby) {
    return format("offset %td of the block's %u bytes of shared memory", address - block.shared,
                  block.shared_bytes);
  }
  for (const GlobalRange& range : global_ranges()) {
    if (address + kNearby > range.begin && address < range.begin + range.bytes + kNearby) {
      return format("offset %td of the %zu bytes of global buffer '%s'", address - range.begin,
                    range.bytes, range.name.c_str());
    }
  }
  return format("address %p, near no buffer that is registered", static_cast<const void*>(address));
}

std::exception_ptr wild_access(const void* address) {
  try {
    fail(ErrorKind::Misuse, "invalid memory access: %s",
         place_of(static_cast<const unsigned char*>(address)).c_str());
  } catch (...) {
    return std::current_exception();
  }
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (machine().current != nullptr && machine().current_operation == nullptr) {
    abandon_current_thread(wild_access(info->si_addr));
  }
  struct sigaction fatal = {};  // in the layer itself: die of the same access
  fatal.sa_handler = SIG_DFL;
  sigaction(signal, &fatal, nullptr);
}

}  // namespace

MemoryFaultHandler::MemoryFaultHandler() {
  const stack_t stack{g_handler_stack, 0, sizeof g_handler_stack};
  sigaltstack(&stack, &stack_before_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler may not return
  sigaction(SIGSEGV, &action, &before_);
}

MemoryFaultHandler::~MemoryFaultHandler() {
  sigaction(SIGSEGV, &before_, nullptr);
  sigaltstack(&stack_before_, nullptr);
}

#endif

}  // namespace emulator
