// Executes every function of csrc/ptx/ with random operands and writes the results as golden
// vectors.
//
//     conformance FILE [--inputs] [--schedule SEED] [--after CASE]
//
// prints each case's name before it begins; FILE then holds the cases before it, from CASE on.
//
// nvcc compiles it for a GPU, g++ for the execution layer, where the seed selects the schedule:
// nothing in the file depends on it. With --inputs the file has the operands too, not only their
// hashes. CONFORMANCE_ARCH is the architecture that it is compiled for, 80 or 90 (sm_90a).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

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

namespace {

// Atomically: neither a reader nor the end of the program can leave half a file.
void write(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  std::FILE* file = std::fopen(partial.c_str(), "wb");
  if (file == nullptr || std::fwrite(text.data(), 1, text.size(), file) != text.size() ||
      std::fclose(file) != 0 || std::rename(partial.c_str(), path.c_str()) != 0) {
    std::perror(path.c_str());
    std::exit(2);
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr uint64_t kInputs = 1;  // the seed of the operands, the same on every machine
  bool with_inputs = false;
  uint64_t schedule = 1;
  std::string after;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--inputs") with_inputs = true;
    if (option == "--schedule" && i + 1 < argc) schedule = std::strtoull(argv[++i], nullptr, 10);
    if (option == "--after" && i + 1 < argc) after = argv[++i];
  }
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FILE [--inputs] [--schedule SEED] [--after CASE]\n", argv[0]);
    return 2;
  }
  conformance::prepare(schedule);
  const std::string producer = conformance::producer();
  std::vector<std::string> cases;
  const auto keep = [&](const conformance::Case& complete) {
    cases.push_back(conformance::json(complete, with_inputs));
    write(argv[1], conformance::json(producer, kInputs, cases));
  };
  conformance::Recorder recorder(kInputs, after, keep);
  conformance::record_sm80(recorder);
#if CONFORMANCE_ARCH >= 90
  recorder.set_architecture(90);
  conformance::record_sm90(recorder);
  conformance::record_tma(recorder);
  conformance::record_wgmma(recorder);
#endif
  recorder.finish();
  return 0;
}
