// Records what a case reads and writes while it runs. Each case is named before it begins, and the
// cases before it are on disk by then: a kernel that hangs or faults loses only its own case, and
// another process goes on `after` it.
#pragma once

#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "emulator/conformance/vectors.h"

namespace conformance {

class Recorder {
 public:
  // `keep` is called with each case when it is complete. Cases up to `after` launch nothing.
  Recorder(uint64_t seed, std::string after, std::function<void(const Case&)> keep)
      : seed_(seed), after_(std::move(after)), keep_(std::move(keep)) {}

  // Sets the architecture of the cases that follow.
  void set_architecture(int architecture) { architecture_ = architecture; }

  // Begins a case. Its random numbers depend only on its name and the seed, so that a new case does
  // not change the others.
  Random begin(const std::string& name, std::vector<std::string> functions,
               Comparison comparison = Comparison::kExact) {
    finish();
    skipping = !after_.empty();
    if (name == after_) after_.clear();
    if (!skipping) {
      std::printf("%s\n", name.c_str());
      std::fflush(stdout);
      current_ = Case{name, std::move(functions), comparison, architecture_, {}, {}};
    }
    return Random(hash(name, seed_));
  }

  template <typename T>
  DeviceArray<T> input(const std::string& name, const std::vector<T>& values,
                       std::vector<size_t> shape = {}) {
    if (current_) current_->inputs.push_back(array(name, values, std::move(shape)));
    return DeviceArray<T>(values);
  }

  // Waits for the kernels.
  template <typename T>
  void output(const std::string& name, DeviceArray<T>& values, std::vector<size_t> shape = {}) {
    if (!current_) return;
    synchronize();
    current_->outputs.push_back(array(name, values.to_host(), std::move(shape)));
  }

  // Ends the last case.
  void finish() {
    if (current_) keep_(*current_);
    current_.reset();
  }

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
  std::string after_;
  std::function<void(const Case&)> keep_;
  int architecture_ = 80;
  std::optional<Case> current_;
};

}  // namespace conformance
