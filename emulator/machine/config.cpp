// The current configuration, and the names of its values.
#include "emulator/machine/config.h"

namespace emulator {

Config& config() {
  static Config current;
  return current;
}

const char* name_of(Schedule schedule) {
  switch (schedule) {
    case Schedule::RunAhead:
      return "RunAhead";
    case Schedule::Random:
      return "Random";
    case Schedule::Priority:
      return "Priority";
  }
  return "?";
}

const char* name_of(Completion completion) {
  switch (completion) {
    case Completion::Early:
      return "Early";
    case Completion::Late:
      return "Late";
    case Completion::Random:
      return "Random";
  }
  return "?";
}

}  // namespace emulator
