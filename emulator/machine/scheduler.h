// What the units of the layer need of the scheduler: waiting, waking, and deferring work.
#pragma once
#include "emulator/machine/machine.h"

namespace emulator {

/// The current thread waits until wake_all(waitable), or make_ready of this thread.
void block_on(Waitable& waitable);

/// The current thread waits until the waitable is woken or has changed(); it also comes back when
/// nothing else can run, so that a loop with several exits keeps going. A machine in which threads
/// only poll is reported as a deadlock.
void poll_on(Waitable& waitable);

/// Puts `thread`, which is not running or is the current one about to suspend, on the waitable's
/// list.
void park(Thread& thread, Waitable& waitable);

void make_ready(Thread& thread);
/// The same for lanes that wait in a collective of their warp.
void make_lanes_ready(Warp& warp, uint32_t lanes);
void wake_all(Waitable& waitable);

/// The current thread lets others run and stays ready.
void yield();

/// A place between two instructions where the schedule may switch to another warp. Every unit calls
/// it after an effect that other threads can see (an arrival, a flag, an issued operation).
void preemption_point();

/// Ends the current thread where it stands, without unwinding, and the launch with that failure:
/// for signal handlers.
[[noreturn]] void abandon_current_thread(std::exception_ptr failure);

/// Suspends the current thread, which has been parked or has exited.
void suspend();

/// Enqueues an asynchronous operation. It is performed between two threads' turns, in any order
/// relative to the others: at once (Early), when nothing else can run (Late), or at random.
/// Operations that must keep an order are chained: each pushes the next one when it is performed.
void engine_push(AsyncOperation operation);

/// `thread` releases (a fence, a flag, a cluster barrier): performs what it issued with
/// before_release.
void perform_before_release(const Thread& thread);

/// Something happened that a waiting thread may see: postpones the verdict that polling threads are
/// stuck.
inline void note_progress() { ++machine().progress; }

/// Runs the machine's grids to completion (called by Stream::synchronize).
void run_machine();

}  // namespace emulator
