// Composes the message of an Error: what happened, who ran, the seed, the call chain.
#include "emulator/machine/fail.h"

#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/machine/machine.h"

namespace emulator {
namespace {

std::string format_arguments(const char* format, va_list arguments) {
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, again);
  va_end(again);
  std::string text(static_cast<size_t>(length), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, arguments);
  return text;
}

std::string who() {
  const Machine& m = machine();
  std::string text;
  if (m.current_operation != nullptr) {
    text =
        format("%s issued by ", m.current_operation->what) + describe(*m.current_operation->issuer);
  } else if (m.current != nullptr) {
    text = describe(*m.current);
  } else {
    text = m.grids.empty() ? "the host" : "the scheduler";
  }
  return text + format("; seed %llu, schedule %s, completion %s",
                       static_cast<unsigned long long>(m.config.seed), name_of(m.config.schedule),
                       name_of(m.config.completion));
}

}  // namespace

const char* name_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::Misuse:
      return "misuse";
    case ErrorKind::Race:
      return "race";
    case ErrorKind::ExitCheck:
      return "exit_check";
    case ErrorKind::Deadlock:
      return "deadlock";
    case ErrorKind::Watchdog:
      return "watchdog";
    case ErrorKind::Uninitialised:
      return "uninitialised";
  }
  return "?";
}

std::string format(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_arguments(format, arguments);
  va_end(arguments);
  return text;
}

std::string call_chain(void* const* addresses, int count) {
  std::string text;
  char** symbols = backtrace_symbols(addresses, count);
  for (int i = 0; i < count; ++i) {
    // "path/binary(+0x1234) [0x5678]": the part before the bracket is what addr2line needs.
    const char* symbol = symbols[i];
    const char* slash = std::strrchr(symbol, '/');
    const char* bracket = std::strstr(symbol, " [");
    if (slash != nullptr) symbol = slash + 1;
    text += "\n    at " + std::string(symbol, bracket != nullptr && bracket > symbol
                                                  ? static_cast<size_t>(bracket - symbol)
                                                  : std::strlen(symbol));
  }
  std::free(symbols);
  return text;
}

void fail(ErrorKind kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string message = std::string(name_of(kind)) + ": " + format_arguments(format, arguments);
  va_end(arguments);
  message += "\n  [" + who() + "]";
  constexpr int kDepth = 10;
  void* addresses[kDepth];
  const int count = backtrace(addresses, kDepth);
  if (count > 1) message += call_chain(addresses + 1, count - 1);
  throw Error(kind, message);
}

std::string describe(const Thread& thread) {
  const Block& block = thread.block();
  return format("block (%u,%u,%u) thread %u = warp %u lane %u", block.index.x, block.index.y,
                block.index.z, thread.linear, thread.warp->index, thread.lane);
}

}  // namespace emulator
