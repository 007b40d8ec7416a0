#include "emulated/cuda/counting.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "emulated/cuda/driver_state.h"

namespace emulator::cuda {
namespace {

constexpr size_t kRoom = size_t{1} << 42;  // of addresses: pages are made where one is touched
constexpr size_t kApart = 512;

std::atomic<bool> counting = false;
std::byte* room = nullptr;
size_t taken = 0;

std::byte* begin_of_room() {
  void* found = mmap(nullptr, kRoom, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(found);
}

}  // namespace

void set_counting(bool on) { counting = on; }
bool is_counting() { return counting; }

void* take_counted(size_t bytes) {
  const std::lock_guard lock(driver().mutex);
  if (room == nullptr) room = begin_of_room();
  const size_t whole = (bytes + kApart - 1) / kApart * kApart;
  if (taken + whole > kRoom) throw std::bad_alloc();
  std::byte* found = room + taken;
  taken += whole;
  driver().record << R"({"call": "allocate", "address": )" << reinterpret_cast<uintptr_t>(found)
                  << R"(, "bytes": )" << bytes << "}\n";
  return found;
}

bool is_counted(const void* address) {
  return room != nullptr && address >= room && address < room + taken;
}

void Addresses::add(const void* parameter, size_t bytes) {
  const auto* from = static_cast<const std::byte*>(parameter);
  for (size_t i = 0; i + sizeof(uint64_t) <= bytes; i += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, from + i, sizeof word);
    if (is_counted(reinterpret_cast<const void*>(word)) &&
        std::find(found_.begin(), found_.end(), word) == found_.end())
      found_.push_back(word);
  }
}

std::string Addresses::json() const {
  std::string text = "[";
  for (const uint64_t each : found_) text += (text.size() > 1 ? ", " : "") + std::to_string(each);
  return text + "]";
}

}  // namespace emulator::cuda
