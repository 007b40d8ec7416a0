// The kernels of PTX files, decoded when they are first launched.
#pragma once
#include <map>
#include <memory>
#include <string>

#include "emulator/ptx/machine.h"

namespace emulator::ptx {

class Library {
 public:
  // Adds the entries of a file, in place of those that have their name.
  void add(const std::string& file);
  bool has(const std::string& kernel) const { return files_.contains(kernel); }
  Program& program(const std::string& kernel);

 private:
  std::map<std::string, std::string> files_;
  std::map<std::string, std::unique_ptr<Program>> decoded_;
};

// The lines of a program's operations, of all or of those that ran: "3-7 9".
std::string lines_of(const Program& program, bool all);

struct LaunchSize {
  uint32_t grid[3], block[3], cluster[3], shared_bytes;
  bool programmatic = false;  // a dependent of the launch before
};

// Runs a kernel with cudaLaunchKernelExC's arguments, as emulator::config() says. Returns how many
// instructions of warps it was.
uint64_t launch(Program& program, const LaunchSize& size, void** arguments, const Config& config);

}  // namespace emulator::ptx
