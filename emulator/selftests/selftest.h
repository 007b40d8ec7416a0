// A dozen lines of test framework: TEST(name) { CHECK(...); CHECK_FAILS(kind, text, expression); }.
// selftest.cpp has the main function: it runs the tests whose name contains its first argument.
#pragma once

#include <exception>
#include <string>

#include "emulator/machine/fail.h"

namespace emulator::selftest {

struct Failure : std::exception {
  explicit Failure(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

// Puts a test on the list that main runs.
struct Registration {
  Registration(const char* name, void (*body)());
};

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  throw Failure(format("%s:%d: does not hold: %s", file, line, condition));
}

template <typename F>
void check_fails(ErrorKind kind, const std::string& text, F&& run, const char* file, int line) {
  try {
    run();
  } catch (const Error& error) {
    if (error.kind == kind && std::string(error.what()).find(text) != std::string::npos) return;
    throw Failure(format("%s:%d: expected %s \"%s\", came %s: %s", file, line, name_of(kind),
                         text.c_str(), name_of(error.kind), error.what()));
  }
  throw Failure(
      format("%s:%d: expected %s \"%s\", came no error", file, line, name_of(kind), text.c_str()));
}

}  // namespace emulator::selftest

#define TEST(name)                                                                   \
  void test_##name();                                                                \
  const emulator::selftest::Registration registration_of_##name{#name, test_##name}; \
  void test_##name()

#define CHECK(...) emulator::selftest::check(bool(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

// The expression must throw emulator::Error of this kind with a message that contains the text.
#define CHECK_FAILS(kind, text, ...) \
  emulator::selftest::check_fails(kind, text, [&] { __VA_ARGS__; }, __FILE__, __LINE__)
