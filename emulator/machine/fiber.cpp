// Fibers on mmapped stacks, with the annotations that AddressSanitizer needs.
#include "emulator/machine/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator/machine/pages.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void emulator_switch_context(void** save, void* load);

namespace emulator {
namespace {

Context* g_left = nullptr;     // the context that the last switch left
Context* g_entered = nullptr;  // and the one that it continued

// AddressSanitizer must know which stack is in use. The bounds of the OS thread's own stack become
// known when it is left.
void switch_arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(g_entered->fake_stack, &bottom, &size);
  if (g_left->stack_bottom == nullptr) {
    g_left->stack_bottom = bottom;
    g_left->stack_size = size;
  }
#endif
}

std::vector<FiberStack>& stack_pool() {
  static std::vector<FiberStack> pool;
  return pool;
}

FiberStack map_stack(size_t bytes) {
  static unsigned count = 0;
  void* memory = mmap(nullptr, bytes + page_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
    std::perror("emulator: cannot map a fiber stack; lower Config::resident_clusters");
    std::abort();
  }
  return {static_cast<unsigned char*>(memory) + page_bytes(), bytes, count++};
}

}  // namespace

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
  g_left = &from;
  g_entered = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_size);
#endif
  emulator_switch_context(&from.stack_pointer, to.stack_pointer);
  switch_arrived();
}

void fiber_entered() { switch_arrived(); }

FiberStack take_stack(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  bytes *= 2;  // redzones between locals
#endif
  bytes = whole_pages(bytes);
  auto& pool = stack_pool();
  while (!pool.empty()) {
    const FiberStack stack = pool.back();
    pool.pop_back();
    if (stack.bytes == bytes) return stack;
    munmap(stack.bottom - page_bytes(), stack.bytes + page_bytes());  // Config::stack_bytes changed
  }
  return map_stack(bytes);
}

void return_stack(FiberStack stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom, stack.bytes);  // frames that were never left
#endif
  stack_pool().push_back(stack);
}

void prepare_context(Context& context, const FiberStack& stack, void (*entry)()) {
  // Stacks begin at page boundaries: without different offsets, the hot ends of all of them fall
  // into the same cache sets, which makes a launch take nearly twice the time.
  constexpr size_t kColourStep = 5 * 64, kColourRange = 4096;
  const size_t colour = stack.colour * kColourStep % kColourRange / 16 * 16;
  auto** top = reinterpret_cast<void**>(stack.bottom + stack.bytes - colour - 64);
  *--top = nullptr;  // where entry would return to: ends every backtrace, and aligns the stack as a
                     // call does
  *--top = reinterpret_cast<void*>(entry);
  constexpr int kSavedRegisters = 6;
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context = {top, stack.bottom, stack.bytes, nullptr};
}

}  // namespace emulator
