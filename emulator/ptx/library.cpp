#include "emulator/ptx/library.h"

#include <algorithm>
#include <fstream>
#include <sstream>

#include "emulator/memory/global_memory.h"
#include "emulator/ptx/decoder.h"
#include "emulator/ptx/global.h"

namespace emulator::ptx {

void Library::add(const std::string& file) {
  std::ifstream stream(file);
  if (!stream) throw Error(ErrorKind::Misuse, "expected PTX in " + file + ", but cannot read it");
  std::stringstream all;
  all << stream.rdbuf();
  const std::string text = all.str(), directive = ".entry ";
  for (size_t at = text.find(directive); at != std::string::npos; at = text.find(directive, at)) {
    at += directive.size();
    const std::string kernel = text.substr(at, text.find_first_of("( \n", at) - at);
    files_[kernel] = file;
    decoded_.erase(kernel);
  }
}

Program& Library::program(const std::string& kernel) {
  std::unique_ptr<Program>& found = decoded_[kernel];
  if (found == nullptr) {
    const auto file = files_.find(kernel);
    if (file == files_.end())
      throw Error(ErrorKind::Misuse, "expected a kernel of the PTX, but none is " + kernel);
    const Module module = parse(file->second, kernel);
    found =
        std::make_unique<Program>(Decoder(file->second, module, module.entries.front()).decode());
  }
  return *found;
}

std::string lines_of(const Program& program, bool all) {
  std::string text;
  int first = 0, last = 0;
  const auto put = [&] {
    if (first != 0) text += (text.empty() ? "" : " ") + std::to_string(first);
    if (first != last) text += "-" + std::to_string(last);
  };
  for (size_t at = 0; at < program.operations.size(); ++at) {
    const int line = program.operations[at].line;
    if ((!all && program.runs[at] == 0) || line == last) continue;
    if (line != last + 1) put(), first = line;
    last = line;
  }
  put();
  return text;
}

uint64_t launch(Program& program, const LaunchSize& size, void** arguments, const Config& config) {
  global_memory().begin_grid(size.programmatic);
  Grid grid;
  grid.program = &program;
  std::copy_n(size.grid, 3, grid.size), std::copy_n(size.block, 3, grid.block);
  std::copy_n(size.cluster, 3, grid.cluster);
  grid.shared_bytes = size.shared_bytes;
  // A tensor map must be 64-byte aligned, as parameters are.
  grid.parameters.resize(program.parameter_bytes + 64);
  unsigned char* base = grid.parameters.data();
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  for (size_t i = 0; i < program.parameter_sizes.size(); ++i)
    std::memcpy(base + program.parameter_offsets[i], arguments[i], program.parameter_sizes[i]);
  grid.parameter_base = base;
  grid.config = config;
  grid.random.reseed(config.seed);
  run(grid);
  check_guard_zones();
  return grid.executed;
}

}  // namespace emulator::ptx
