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

// `body` must throw an Error of that kind with a message that contains the text.
template <typename F>
void fails(const std::string& where, ErrorKind kind, const std::string& text, F&& body) {
  std::string came = "no error";
  try {
    body();
  } catch (const Error& error) {
    came = error.what();
    if (error.kind == kind && came.find(text) != std::string::npos) return;
  }
  throw Failure(format("%s: expected %s \"%s\", came %s", where.c_str(), name_of(kind),
                       text.c_str(), came.c_str()));
}

}  // namespace emulator::selftest

#define TEST(name)                                                                   \
  void test_##name();                                                                \
  const emulator::selftest::Registration registration_of_##name{#name, test_##name}; \
  void test_##name()

#define CHECK(...) emulator::selftest::check(bool(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

#define CHECK_FAILS(kind, text, ...)                                                   \
  emulator::selftest::fails(emulator::format("%s:%d", __FILE__, __LINE__), kind, text, \
                            [&] { __VA_ARGS__; })
