// The planted mutant. Apart from the kernels' translation units, so that looking it up is not
// instrumented.
#include "emulator/fault.h"

#include <cstring>

namespace emulator {
namespace {
std::string planted;
uint64_t reached = 0;
bool recording = false;
std::set<std::string> recorded;
}  // namespace

void plant_fault(const char* mutant) {
  planted = mutant;
  reached = 0;
}

uint64_t planted_fault_reached() { return reached; }

void record_fault_sites() { recording = true; }
const std::set<std::string>& recorded_fault_sites() { return recorded; }

bool fault_is_planted(const char* site, const char* direction) {
  if (recording) recorded.insert(site);
  if (planted.empty()) return false;
  const size_t length = std::strlen(site);
  if (planted.compare(0, length, site) != 0 ||
      planted.compare(length, std::string::npos, direction) != 0) {
    return false;
  }
  ++reached;
  return true;
}

}  // namespace emulator
