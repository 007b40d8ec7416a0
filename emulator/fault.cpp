#include "emulator/fault.h"

namespace emulator {
namespace {

uint32_t planted_mutant = 0;
uint64_t reached = 0;

}  // namespace

uint32_t number_of(const char* mutant) {
  if (*mutant == 0) return 0;
  uint32_t number = 0x811C9DC5;
  for (; *mutant != 0; ++mutant)
    number = (number ^ static_cast<unsigned char>(*mutant)) * 0x01000193;
  return number;
}

void plant_fault(const char* mutant) {
  planted_mutant = number_of(mutant);
  reached = 0;
}

uint64_t planted_fault_reached() { return reached; }

bool is_planted(uint32_t mutant) {
  const bool is = mutant == planted_mutant;
  reached += is;
  return is;
}

bool condition(uint32_t always, uint32_t never, bool right) {
  if (is_planted(always)) return true;
  return !is_planted(never) && right;
}

int off_by(uint32_t low, uint32_t high) {
  if (is_planted(low)) return -1;
  return is_planted(high) ? 1 : 0;
}

}  // namespace emulator
