// A timer of processor time, and what happens when it is over.
#include "emulator/machine/watchdog.h"

#include <execinfo.h>
#include <signal.h>
#include <sys/time.h>

#include <algorithm>

#include "emulator/machine/deadlock.h"
#include "emulator/machine/scheduler.h"

namespace emulator {
namespace {

constexpr int kTicks = 8;  // of the timer until the time is over

volatile sig_atomic_t g_ticks_left = 0;
uint64_t g_turns_at_expiry = 0;

std::exception_ptr spinning_thread() {
  try {
    fail(ErrorKind::Watchdog,
         "a thread ran for more than %g seconds of processor time without letting others run: an "
         "endless loop in the kernel, "
         "or one that polls memory with plain loads",
         machine().config.watchdog_seconds);
  } catch (...) {
    return std::current_exception();
  }
}

void on_tick(int) {
  Machine& m = machine();
  if (g_ticks_left > 0) {
    g_ticks_left = g_ticks_left - 1;
  } else if (!m.time_is_over) {
    m.time_is_over = 1;
    g_turns_at_expiry = m.turns;
  } else if (m.current != nullptr && m.turns == g_turns_at_expiry) {
    // A whole tick later the scheduler has still not checked: the thread spins in its own code,
    // where it can be abandoned.
    abandon_current_thread(spinning_thread());
  }
}

void set_timer(double seconds) {
  const auto microseconds = static_cast<long>(seconds * 1e6);
  const timeval interval{microseconds / 1000000, microseconds % 1000000};
  const itimerval timer{interval, interval};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

}  // namespace

Watchdog::Watchdog(double seconds) {
  g_ticks_left = kTicks - 1;
  machine().time_is_over = 0;
  void* address;
  backtrace(&address, 1);  // the first call loads a library, which a signal handler should not
  struct sigaction action = {};
  action.sa_handler = on_tick;
  action.sa_flags = SA_RESTART | SA_NODEFER;  // the handler may not return
  sigaction(SIGVTALRM, &action, nullptr);
  set_timer(std::max(seconds / kTicks, 0.001));
}

Watchdog::~Watchdog() { set_timer(0); }

void watchdog_report() {
  fail(ErrorKind::Watchdog, "the launch took more than %g seconds of processor time%s",
       machine().config.watchdog_seconds, describe_waiting_threads().c_str());
}

}  // namespace emulator
