// Counting instead of running: the record says what each launch, and each op of torch's library, was
// given, and neither is run. Memory costs nothing until it is touched, so shapes may be those of
// whole models.
//
// Ops on integers alone do run: routes, and what the host reads, are what they are on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator::cuda {

void set_counting(bool on);
bool is_counting();
// Memory of the device, of zeros. No two calls return the same, also after it was freed.
void* take_counted(size_t bytes);
bool is_counted(const void* address);

// The addresses of counted memory in what a kernel is given.
class Addresses {
 public:
  void add(const void* parameter, size_t bytes);
  std::string json() const;

 private:
  std::vector<uint64_t> found_;
};

}  // namespace emulator::cuda
