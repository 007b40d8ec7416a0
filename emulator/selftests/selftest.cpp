// The main function of the self-tests; see selftest.h.
#include "emulator/selftests/selftest.h"

#include <cstdio>
#include <cstring>
#include <vector>

namespace emulator::selftest {
namespace {

struct Test {
  const char* name;
  void (*body)();
};

std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

}  // namespace

Registration::Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }

}  // namespace emulator::selftest

int main(int argc, char** argv) {
  using namespace emulator::selftest;
  int run = 0, failed = 0;
  for (const auto& [name, body] : tests()) {
    if (argc > 1 && std::strstr(name, argv[1]) == nullptr) continue;
    ++run;
    try {
      body();
      std::printf("ok    %s\n", name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAIL  %s\n      %s\n", name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return run == 0 || failed != 0;
}
