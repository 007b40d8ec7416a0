// Records what a case reads and writes while it runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "emulator/conformance/vectors.h"

namespace conformance {

class Recorder {
 public:
  explicit Recorder(uint64_t seed) : seed_(seed) {}

  // Of the cases that follow.
  void set_architecture(int architecture) { architecture_ = architecture; }

  // Begins a case. Its random numbers depend on its name and the seed alone, so that a new case
  // leaves the others as they are.
  Random begin(const std::string& name, std::vector<std::string> functions,
               Comparison comparison = Comparison::kExact) {
    cases_.push_back({name, std::move(functions), comparison, architecture_, {}, {}});
    return Random(hash(name, seed_));
  }

  template <typename T>
  DeviceArray<T> input(const std::string& name, const std::vector<T>& values,
                       std::vector<size_t> shape = {}) {
    cases_.back().inputs.push_back(array(name, values, std::move(shape)));
    return DeviceArray<T>(values);
  }

  // Waits for the kernels.
  template <typename T>
  void output(const std::string& name, DeviceArray<T>& values, std::vector<size_t> shape = {}) {
    synchronize();
    cases_.back().outputs.push_back(array(name, values.to_host(), std::move(shape)));
  }

  const std::vector<Case>& cases() const { return cases_; }

 private:
  template <typename T>
  static Array array(const std::string& name, const std::vector<T>& values,
                     std::vector<size_t> shape) {
    if (shape.empty()) shape = {values.size()};
    std::vector<unsigned char> bytes(values.size() * sizeof(T));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return {name, type_name<T>(), std::move(shape), std::move(bytes)};
  }

  uint64_t seed_;
  int architecture_ = 80;
  std::vector<Case> cases_;
};

}  // namespace conformance
