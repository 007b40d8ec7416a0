#include "emulator/ptx/decoder.h"

#include <algorithm>

#include "emulator/machine/fail.h"

namespace emulator::ptx {

const Table& table() {
  static const Table all = [] {
    Table made;
    add_arithmetic(made), add_conversions(made), add_memory(made), add_copies(made);
    add_boxes(made), add_lanes(made);
    add_barriers(made), add_mbarriers(made), add_matrix(made), add_wgmma(made);
    return made;
  }();
  return all;
}

Maker plain(Run run, std::vector<int> bits) {
  return [run, bits](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, bits.size());
    made.run = run;
    uint32_t* const slots[] = {&made.d, &made.a, &made.b, &made.c};
    for (size_t i = 0; i < bits.size(); ++i) {
      *slots[i] = i == 0 ? decoder.result(statement.operands[i], bits[i])
                         : decoder.source(statement.operands[i], bits[i]);
    }
  };
}

Decoder::Decoder(const std::string& file, const Module& module, const Entry& entry)
    : file_(file), module_(module), entry_(entry) {}

void Decoder::refuse(const std::string& message) const {
  ptx::refuse(file_, statement_->line, statement_->opcode + ": " + message);
}

void Decoder::demand_operands(const Statement& statement, size_t count) const {
  if (statement.operands.size() != count)
    refuse("expected " + std::to_string(count) + " operands, but got " +
           std::to_string(statement.operands.size()));
}

int Decoder::bits_of(const Operand& operand) const {
  if (operand.kind != Operand::kRegister) refuse("expected a register as operand");
  return entry_.registers.at(operand.name);
}

uint32_t Decoder::slot_of_register(const std::string& name) {
  const auto [found, is_new] = registers_.try_emplace(name, slots_);
  if (is_new) new_slot();
  return found->second;
}

uint32_t Decoder::result(const Operand& operand, int bits) {
  const int has = bits_of(operand);
  if (has != bits)
    refuse("expected a result of " + std::to_string(bits) + " bits, but " + operand.name + " has " +
           std::to_string(has));
  return slot_of_register(operand.name);
}

uint64_t Decoder::constant(const Operand& operand) const {
  if (operand.kind != Operand::kImmediate) refuse("expected a number as operand");
  return operand.value;
}

bool Decoder::is_shared(const Operand& operand) const {
  const auto& names = module_.shared;
  return std::find(names.begin(), names.end(), operand.name) != names.end();
}

uint32_t Decoder::source(const Operand& operand, int bits) {
  if (operand.kind == Operand::kImmediate) {
    const auto [found, is_new] = constants_.try_emplace({operand.value, bits}, slots_);
    if (is_new) new_slot();
    return found->second;
  }
  if (operand.kind == Operand::kSpecial || operand.kind == Operand::kSymbol) {
    const auto [found, is_new] = named_.try_emplace(operand.name, slots_);
    if (is_new) new_slot();
    const bool parameter = operand.kind == Operand::kSymbol && !is_shared(operand);
    if (bits != (parameter ? 64 : 32))
      refuse("expected an operand of " + std::to_string(bits) + " bits, but got " + operand.name);
    return found->second;
  }
  const int has = bits_of(operand);
  if (has != bits)
    refuse("expected an operand of " + std::to_string(bits) + " bits, but " + operand.name +
           " has " + std::to_string(has));
  return slot_of_register(operand.name);
}

void Decoder::address(const Operand& operand, Operation& into, int bits) {
  if (operand.kind != Operand::kAddress) refuse("expected an address as operand");
  const Operand& base = operand.parts.front();
  into.a = source(base, is_shared(base) ? 32 : bits);
  into.offset = static_cast<int64_t>(operand.value);
}

namespace {

template <class T>
void broadcast(Slot& slot, T value) {
  for (uint32_t lane = 0; lane < kLanes; ++lane)
    std::memcpy(slot.bytes + lane * sizeof(T), &value, sizeof(T));
}

void broadcast_bits(Slot& slot, uint64_t value, int bits) {
  if (bits == 1) broadcast<uint32_t>(slot, value != 0 ? kAll : 0);
  if (bits == 16) broadcast(slot, static_cast<uint16_t>(value));
  if (bits == 32) broadcast(slot, static_cast<uint32_t>(value));
  if (bits == 64) broadcast(slot, value);
}

}  // namespace

Program Decoder::decode() {
  made_.file = file_, made_.name = entry_.name, made_.parameter_bytes = entry_.parameter_bytes;
  for (const Parameter& each : entry_.parameters) {
    made_.parameter_sizes.push_back(each.bytes);
    made_.parameter_offsets.push_back(each.offset);
  }
  for (const Statement& statement : entry_.statements) {
    statement_ = &statement;
    Operation operation;
    operation.line = statement.line;
    if (!statement.guard.empty()) {
      operation.guard = slot_of_register(statement.guard), operation.negated = statement.negated;
    }
    if (statement.opcode == "bra" || statement.opcode == "bra.uni") {
      demand_operands(statement, 1);
      const auto found = entry_.labels.find(statement.operands[0].name);
      if (found == entry_.labels.end()) refuse("no label " + statement.operands[0].name);
      operation.branches = true, operation.target = found->second;
    } else {
      const auto found = table().find(statement.opcode);
      if (found == table().end()) refuse("this instruction, or one of its modifiers, is unknown");
      found->second(*this, statement, operation);
    }
    made_.operations.push_back(std::move(operation));
  }
  find_reconvergence(made_.operations);
  made_.image.resize(slots_);
  made_.defined.assign(slots_, 0);
  std::memset(static_cast<void*>(made_.image.data()), kPoisonByte, slots_ * sizeof(Slot));
  for (const auto& [key, slot] : constants_) {
    broadcast_bits(made_.image[slot], key.first, key.second);
    made_.defined[slot] = kAll;
  }
  for (const auto& [name, slot] : named_) {
    made_.defined[slot] = kAll;
    if (name[0] == '%') {
      made_.specials.emplace_back(slot, name);
      continue;
    }
    bool parameter = false;
    for (const Parameter& each : entry_.parameters) {
      if (each.name != name) continue;
      made_.parameter_symbols.emplace_back(slot, each.offset), parameter = true;
    }
    if (!parameter) broadcast_bits(made_.image[slot], kSharedBase, 32);
  }
  std::vector<bool> accumulators(slots_);
  for (const uint32_t slot : accumulators_) accumulators[slot] = true;
  for (Operation& each : made_.operations) {
    const bool writes = each.kind != kWgmma && each.d != kNone && accumulators[each.d];
    each.touches_accumulators = writes;
  }
  made_.runs.assign(made_.operations.size(), 0);
  return std::move(made_);
}

}  // namespace emulator::ptx
