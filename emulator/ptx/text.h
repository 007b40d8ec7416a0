// The text of a PTX module, parsed: entries, their registers and parameters, and statements as they
// stand. What the grammar here does not have is an error that names the line.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator::ptx {

struct Operand {
  enum Kind { kRegister, kImmediate, kSymbol, kSpecial, kAddress, kVector, kSink, kPair, kLabel };
  Kind kind;
  std::string name;            // of a register, symbol, special register or label
  uint64_t value = 0;          // of an immediate; the offset of an address
  std::vector<Operand> parts;  // of a vector; the base of an address, then its coordinates; a|b
};

struct Statement {
  int line;
  std::string guard;  // the register of @p, or ""
  bool negated = false;
  std::string opcode;
  std::vector<Operand> operands;
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

struct Entry {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  std::map<std::string, int> registers;  // bits; 1: a predicate
  std::vector<Statement> statements;
  std::map<std::string, uint32_t> labels;
};

struct Module {
  std::string target;
  std::vector<std::string> shared;  // names of the dynamic shared memory
  std::vector<Entry> entries;
};

// All entries, or the one of this name. Throws Error (Misuse) as "FILE:LINE: expected ..., but got
// ...".
Module parse(const std::string& file, const std::string& entry = "");

[[noreturn]] void refuse(const std::string& file, int line, const std::string& message);

}  // namespace emulator::ptx
