// Executes every function of csrc/ptx/ with random operands and writes what came out, as golden
// vectors.
//
//     conformance FILE [--inputs] [--schedule SEED]
//
// nvcc compiles it for a GPU, g++ for the execution layer, whose schedule the seed chooses: nothing
// in the file depends on it. With --inputs the file has the operands too, and not just their
// hashes. CONFORMANCE_ARCH is the architecture that it is compiled for, 80 or 90 (sm_90a).
#include <cstdio>
#include <cstdlib>
#include <string>

#ifdef __CUDACC__
#include "emulator/conformance/target_cuda.h"
#else
#include "emulator/conformance/target_emulator.h"
#endif
#include "emulator/conformance/recorder.h"
//
#include "emulator/conformance/cases_sm80.h"
#if CONFORMANCE_ARCH >= 90
#include "emulator/conformance/cases_sm90.h"
#include "emulator/conformance/cases_tma.h"
#include "emulator/conformance/cases_wgmma.h"
#endif

int main(int argc, char** argv) {
  constexpr uint64_t kInputs = 1;  // the seed of the operands, the same on every machine
  bool with_inputs = false;
  uint64_t schedule = 1;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--inputs") with_inputs = true;
    if (option == "--schedule" && i + 1 < argc) schedule = std::strtoull(argv[++i], nullptr, 10);
  }
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FILE [--inputs] [--schedule SEED]\n", argv[0]);
    return 2;
  }
  conformance::prepare(schedule);
  conformance::Recorder recorder(kInputs);
  conformance::record_sm80(recorder);
#if CONFORMANCE_ARCH >= 90
  recorder.set_architecture(90);
  conformance::record_sm90(recorder);
  conformance::record_tma(recorder);
  conformance::record_wgmma(recorder);
#endif
  const std::string text =
      conformance::json(conformance::producer(), kInputs, recorder.cases(), with_inputs);
  std::FILE* file = std::fopen(argv[1], "wb");
  if (file == nullptr || std::fwrite(text.data(), 1, text.size(), file) != text.size() ||
      std::fclose(file) != 0) {
    std::perror(argv[1]);
    return 2;
  }
  return 0;
}
