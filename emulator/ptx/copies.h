// What asynchronous copies share: what a copy writes is in flight, and poison, until it has been waited
// for, whenever it lands.
#pragma once
#include "emulator/ptx/loops.h"

namespace emulator::ptx {

inline bool lands_at_once(Grid& grid) {
  return grid.config.completion == Completion::Early ||
         (grid.config.completion == Completion::Random && grid.random.one_in(2));
}

inline void demand(const Warp& warp, const Operation& o, const std::string& wrong) {
  if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
}

// An instruction without operands, or with the number of groups that may be left.
inline Maker group_operation(Run run, int operands) {
  return [=](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, static_cast<size_t>(operands));
    if (operands == 1) made.mode = static_cast<uint32_t>(decoder.constant(statement.operands[0]));
    made.run = run, made.sign = statement.opcode == "cp.async.bulk.wait_group";
  };
}

}  // namespace emulator::ptx
