// What every thread waits for, when none can go on.
#pragma once
#include <string>

namespace emulator {

/// One line for each distinct thing that is waited for: the threads, its name and its state.
std::string describe_waiting_threads();
[[noreturn]] void report_deadlock();

}  // namespace emulator
