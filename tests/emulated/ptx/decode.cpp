// Decodes every entry of PTX files: prints FILE, ENTRY and the lines of its operations.
#include <cstdio>

#include "emulator/machine/fail.h"
#include "emulator/ptx/decoder.h"
#include "emulator/ptx/library.h"

int main(int argc, char** argv) try {
  using namespace emulator::ptx;
  for (int i = 1; i < argc; ++i) {
    const std::string file = argv[i];
    const Module module = parse(file);
    for (const Entry& entry : module.entries) {
      const Program program = Decoder(file, module, entry).decode();
      std::printf("%s %s %s\n", argv[i], entry.name.c_str(), lines_of(program, true).c_str());
    }
  }
} catch (const emulator::Error& error) {
  std::printf("%s\n", error.what());
  return 1;
}
