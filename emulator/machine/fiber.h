// A context of execution with a stack of its own, and the switch between two of them. All fibers
// run in one OS thread.
#pragma once
#include <cstddef>

namespace emulator {

/// Where a fiber, or the scheduler on the OS thread's own stack, left off.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;  ///< lowest address, known to AddressSanitizer
  size_t stack_size = 0;
  void* fake_stack = nullptr;  ///< AddressSanitizer's
};

/// Saves the caller in `from` and continues `to`. Returns when another context switches back to
/// `from`; with `last` that never happens.
void switch_context(Context& from, Context& to, bool last = false);

/// A stack with an inaccessible page below it; recycled through a pool, because mapping one costs
/// microseconds.
struct FiberStack {
  unsigned char* bottom = nullptr;
  size_t bytes = 0;
  unsigned colour = 0;
};
FiberStack take_stack(size_t bytes);
void return_stack(FiberStack stack);

/// Prepares `context` to enter `entry`, which must never return, on `stack`.
void prepare_context(Context& context, const FiberStack& stack, void (*entry)());

/// To be called first thing in `entry`.
void fiber_entered();

}  // namespace emulator
