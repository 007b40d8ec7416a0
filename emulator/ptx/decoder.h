// From statements to operations. Each family of instructions (arithmetic.cpp, memory.cpp, ...) adds
// its opcodes to the table, whole, with every modifier: what is not in it is an error.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulator/ptx/machine.h"
#include "emulator/ptx/text.h"

namespace emulator::ptx {

class Decoder;
// Fills in the operation of a statement.
using Maker = std::function<void(Decoder&, const Statement&, Operation&)>;
using Table = std::map<std::string, Maker>;

void add_arithmetic(Table& table);
void add_conversions(Table& table);
void add_memory(Table& table);
void add_copies(Table& table);
void add_boxes(Table& table);
void add_lanes(Table& table);
void add_barriers(Table& table);
void add_mbarriers(Table& table);
void add_matrix(Table& table);
void add_wgmma(Table& table);
const Table& table();

// An instruction whose operands are registers or immediates of these sizes, the result first.
Maker plain(Run run, std::vector<int> bits);

class Decoder {
 public:
  Decoder(const std::string& file, const Module& module, const Entry& entry);
  Program decode();

  [[noreturn]] void refuse(const std::string& message) const;
  void demand_operands(const Statement& statement, size_t count) const;
  int bits_of(const Operand& operand) const;  // of a register
  uint32_t source(const Operand& operand, int bits);
  // A register that is written.
  uint32_t result(const Operand& operand, int bits);
  // Of an address: its base in `a`, its offset.
  void address(const Operand& operand, Operation& into, int bits);
  uint64_t constant(const Operand& operand) const;  // of an immediate
  void accumulates(uint32_t slot) { accumulators_.push_back(slot); }

 private:
  bool is_shared(const Operand& operand) const;
  uint32_t slot_of_register(const std::string& name);
  uint32_t new_slot() { return slots_++; }

  const std::string& file_;
  const Module& module_;
  const Entry& entry_;
  const Statement* statement_ = nullptr;
  Program made_;
  uint32_t slots_ = 0;
  std::map<std::string, uint32_t> registers_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::map<std::string, uint32_t> named_;  // symbols and special registers
  std::vector<uint32_t> accumulators_;
};

// Where lanes that part at each branch meet again: the first statement that all of them come to, or
// kNone for the end.
void find_reconvergence(std::vector<Operation>& operations);

}  // namespace emulator::ptx
