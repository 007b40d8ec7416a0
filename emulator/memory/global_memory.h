// Global memory of tests: buffers with guard zones, known to the checkers.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator/machine/fail.h"
#include "emulator/race/race.h"

namespace emulator {

struct GlobalRange {
  const unsigned char* begin;
  size_t bytes;
  size_t guard_bytes;  ///< on either side, that no access may touch; 0 for register_global
  std::string name;
};

/// Tells the checkers of a buffer that the host owns.
void register_global(const void* pointer, size_t bytes, const char* name);
void unregister_global(const void* pointer);

/// All registered buffers, by address.
const std::vector<GlobalRange>& global_ranges();
/// The registered buffer that contains `pointer`, or null.
const GlobalRange* find_global(const void* pointer);

/// Fails if an access that the layer performs for a kernel is misaligned, or leaves the registered
/// buffer in which it starts, or touches a guard zone.
void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what);

/// Fails if something wrote into a guard zone. Called after every launch.
void check_guard_zones();

/// `bytes` of poisoned memory, 1024-byte aligned, between two guard zones; registered under `name`.
unsigned char* allocate_global(size_t bytes, const char* name);
void free_global(unsigned char* pointer);

/// An array in global memory. It starts out as poison.
template <class T>
class GlobalBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit GlobalBuffer(size_t size, const char* name = "buffer")
      : data_(reinterpret_cast<T*>(allocate_global(size * sizeof(T), name))), size_(size) {}
  GlobalBuffer(const std::vector<T>& values, const char* name = "buffer")
      : GlobalBuffer(values.size(), name) {
    std::copy(values.begin(), values.end(), data_);
    race_host_write(data_, size_ * sizeof(T));
  }
  ~GlobalBuffer() { free_global(reinterpret_cast<unsigned char*>(data_)); }
  GlobalBuffer(const GlobalBuffer&) = delete;
  GlobalBuffer& operator=(const GlobalBuffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  void fill(T value) {
    std::fill(begin(), end(), value);
    race_host_write(data_, size_ * sizeof(T));
  }
  std::vector<T> to_vector() const { return std::vector<T>(begin(), end()); }

 private:
  T* data_;
  size_t size_;
};

}  // namespace emulator
