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
#include <functional>
#include <string>
#include <vector>

#include "emulator/machine/launch.h"

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

struct Program {
  const char* name;
  std::vector<Size> sizes;
  std::vector<const char*> variants;
  // Runs the kernels and compares what they wrote with the reference: "" or the first difference.
  // Throws emulator::Error.
  std::function<std::string(const Case&)> run;
  std::function<double(const Size&)> flops;
};

// Of a GEMM: 2 m n k.
inline double gemm_flops(const Size& size) { return 2.0 * size.m * size.n * size.k; }

// Runs what the stream holds, and counts the time as that of the kernels.
void run_timed(emulator::Stream& stream);

// A fact about the run under way, such as the route it took, for the line that it prints.
void tell(const std::string& fact);

int program_main(int argc, char** argv, const Program& program);

}  // namespace kernels
