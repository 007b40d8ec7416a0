// Mutants of kernels, planted at run time, one at a time: one binary holds them all. The tool that
// makes mutants writes copies of the kernels' sources with calls of these functions around the text
// that a mutant changes. A mutant is identified by the hash of its name.
#pragma once
#include <cstdint>
#include <type_traits>

namespace emulator {

// Plants the mutant of this name; an empty name plants none.
void plant_fault(const char* mutant);

// FNV-1a; 0 for an empty name.
uint32_t number_of(const char* mutant);

// How often the program reached the planted mutant: one that no test case reaches proves nothing.
uint64_t planted_fault_reached();

// Not of this file's includer's translation unit, so that looking it up is not instrumented.
bool is_planted(uint32_t mutant);
bool condition(uint32_t always, uint32_t never, bool right);
int off_by(uint32_t low, uint32_t high);  // -1, 1, or 0 if neither is planted

// Constant evaluation uses the source as written.
constexpr bool planted(uint32_t mutant) {
  return !std::is_constant_evaluated() && is_planted(mutant);
}

}  // namespace emulator
