#include "emulated/mutants/known_fault.h"

#include <cstdio>
#include <cstdlib>
#include <set>

#include "emulator/fault.h"

void emulated::plant_known_fault(const char* mutant) {
  static const std::set<uint32_t> known = {
      0,
#include "known_mutants.inc"  // of the copies
  };
  if (!known.contains(emulator::number_of(mutant))) {
    std::fprintf(stderr, "no copy has a mutant \"%s\": mutants/rules.py names them\n", mutant);
    std::abort();
  }
  emulator::plant_fault(mutant);
}
