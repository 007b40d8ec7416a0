// The command line that the kernels' host programs share. A run is one case: the seed draws the
// size, the variant, the schedule, the completion and the residency, and whatever an argument fixes
// stays fixed. Each run prints a line of JSON.
//
//   --seed S | --seeds A:B    the seeds A .. B - 1
//   --size NAME  --variant NAME  --schedule NAME  --completion NAME  --resident CLUSTERS
//   --fault MUTANT            plants it (fault.h)
//   --watchdog SECONDS        processor time that one launch may take
//
// The first run that is not clean ends the program, with exit status 1.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "emulated/kernels/reference.h"
#include "emulator/counts/counters.h"
#include "emulator/emulator.h"

namespace kernels {

struct Size {
  const char* name;
  int m, n, k;
};

struct Case {
  uint64_t seed;
  Size size;
  std::string variant;
};

// Runs the kernels and compares what they wrote with the reference. Throws Difference and
// emulator::Error.
struct Variant {
  const char* name;
  void (*run)(const Case&);
};

// What a host program defines.
struct Program {
  const char* name;
  std::vector<Variant> variants;
  std::vector<Size> sizes;
};
extern const Program program;

// Runs what the stream holds, and counts the time as that of the kernels.
void run_timed(emulator::Stream& stream);

// A fact about the run under way, such as the route it took, for the line that it prints.
void tell(const std::string& fact);

// For grids of hundreds of blocks: limits the resident blocks, since each thread has its own stack.
void limit_residency();

// Number of blocks of `size` that cover `count`, for a grid.
inline unsigned blocks_of(int count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

// Expected counts of memory accesses and of tensor-core operations.
inline int64_t counted_bytes(emulator::GlobalAccess kind) {
  return static_cast<int64_t>(emulator::counters().global_bytes[static_cast<int>(kind)]);
}
inline void compare_count(const char* what, uint64_t counted, int64_t expected) {
  const auto count = static_cast<int64_t>(counted);
  if (count != expected)
    differ("%s: expected %lld, but counted %lld", what, static_cast<long long>(expected),
           static_cast<long long>(count));
}
inline void compare_copied_bytes(int64_t expected) {
  compare_count("bytes copied", counted_bytes(emulator::GlobalAccess::CpAsync), expected);
}

}  // namespace kernels
