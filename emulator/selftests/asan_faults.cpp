// Faults that AddressSanitizer and UndefinedBehaviorSanitizer report from inside a kernel, on
// fibers and in the layer's memory. Each ends its process, so each runs in a child, whose report is
// compared.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

// What the child wrote to stderr; "" if it exited with status 0.
std::string report_of(const std::function<void()>& body) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    try {
      body();
    } catch (const std::exception& error) {
      dprintf(STDERR_FILENO, "%s", error.what());
      _exit(1);
    }
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t count; (count = read(ends[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(count));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) text += format("killed by signal %d", WTERMSIG(status));
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : text;
}

void expect_report(const char* text, const std::function<void()>& body) {
  const std::string report = report_of(body);
  if (report.find(text) == std::string::npos)
    throw Failure(format("expected a report of \"%s\", came: %.600s", text, report.c_str()));
  CHECK(report.find("asan_faults.cpp") != std::string::npos);
}

// An index or a pointer whose value the compiler cannot know.
template <class T>
T opaque(T value) {
  static volatile bool never = false;
  return never ? T{} : value;
}

TEST(a_right_kernel_gives_no_report) {
  CHECK(report_of([] {
          GlobalBuffer<float> buffer(33, "buffer");
          for_each_schedule(2, [&] {
            launch(race_launch(4, 96, 1000, 2), [&] {
              float* values = shared_array<float>();
              for (uint32_t i = threadIdx.x; i < 250; i += 96) values[i] = 1;
              __syncthreads();
              if (threadIdx.x < 33 && blockIdx.x == 0)
                buffer[threadIdx.x] = values[249 - threadIdx.x];
              sync_cluster();
            });
          });
        }).empty());
}

TEST(shared_memory_past_the_end) {
  expect_report("AddressSanitizer: use-after-poison", [] {
    launch(race_launch(2, 32, 1000), [] { shared_array<float>()[opaque(threadIdx.x + 219)] = 1; });
  });
}

TEST(global_memory_past_the_end_and_before_the_beginning) {
  for (int at : {-1, 33})
    expect_report("AddressSanitizer: use-after-poison", [at] {
      GlobalBuffer<float> buffer(33, "buffer");
      buffer.fill(1);
      launch(race_launch(1, 32), [&] {
        if (threadIdx.x == 7) buffer[0] = buffer.data()[opaque(at)];
      });
    });
}

TEST(an_array_on_a_fiber_stack) {
  expect_report("AddressSanitizer: stack-buffer-overflow", [] {
    launch(race_launch(1, 32), [] {
      float fragment[4] = {1, 2, 3, 4};
      __syncthreads();  // another fiber runs in between
      *(opaque(&fragment[0]) + (threadIdx.x == 31 ? 4 : 0)) += 1;
      shared_array<float>()[threadIdx.x] = fragment[opaque(1)];
    });
  });
}

TEST(undefined_behaviour) {
  expect_report("signed integer overflow", [] {
    launch(race_launch(1, 32), [] {
      const int rows = opaque(1 << 20);
      shared_array<int>()[threadIdx.x] = rows * opaque(4096);
    });
  });
  expect_report("misaligned address", [] {
    launch(race_launch(1, 32), [] {
      unsigned char* bytes = dynamic_shared_memory();
      if (threadIdx.x == 2) *reinterpret_cast<float*>(bytes + opaque(2)) = 1;
    });
  });
  expect_report("shift exponent", [] {
    launch(race_launch(1, 32),
           [] { shared_array<unsigned>()[threadIdx.x] = 1u << opaque(threadIdx.x + 1); });
  });
}

}  // namespace
}  // namespace emulator::selftest
