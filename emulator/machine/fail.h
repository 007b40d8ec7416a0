// How the layer reports a fault: one exception type, thrown where the fault is seen. Inside a
// kernel it unwinds the thread's fiber and then surfaces from launch() or Stream::synchronize().
#pragma once
#include <stdexcept>
#include <string>

namespace emulator {

struct Thread;

enum class ErrorKind {
  Misuse,         ///< an instruction used against its specification
  Race,           ///< conflicting accesses without a happens-before order (race builds)
  ExitCheck,      ///< something was left unfinished when a thread or block exited
  Deadlock,       ///< no thread can make progress
  Watchdog,       ///< the launch took more processor time than allowed
  Uninitialised,  ///< a read of memory that nothing wrote (race builds)
};

/// "misuse", "race", "exit_check", "deadlock", "watchdog", "uninitialised".
const char* name_of(ErrorKind kind);

struct Error : std::runtime_error {
  Error(ErrorKind error_kind, const std::string& message)
      : std::runtime_error(message), kind(error_kind) {}
  ErrorKind kind;
};

/// Throws Error with the formatted message, followed by who ran (block, warp, lane), the seed,
/// schedule and completion, and the call chain as binary+offset pairs for addr2line.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(ErrorKind kind, const char* format, ...);

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* format, ...);

/// Return addresses as "binary(+offset)" lines.
std::string call_chain(void* const* addresses, int count);

/// "block (1,0,0) thread 37 = warp 1 lane 5".
std::string describe(const Thread& thread);

}  // namespace emulator
