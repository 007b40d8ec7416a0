// Loads and stores, of one element or a vector, and atomics.
#include <sstream>

#include "emulator/memory/global_memory.h"
#include "emulator/ptx/copies.h"
#include "emulator/ptx/global.h"

namespace emulator::ptx {

Place shared_place(Warp& warp, const Operation& o, uint32_t address, uint32_t bytes,
                   uint32_t alignment) {
  Cluster& cluster = *warp.block->cluster;
  const uint32_t rank = address >> kRankShift,
                 offset = (address & ((1u << kRankShift) - 1)) - kSharedBase;
  if (rank > cluster.blocks.size())
    fail_at(warp, o, ErrorKind::Misuse, format("shared address 0x%x names no block", address));
  Block& block = rank == 0 ? *warp.block : *cluster.blocks[rank - 1];
  if (offset > block.shared.size() || bytes > block.shared.size() - offset)
    fail_at(warp, o, ErrorKind::Misuse,
            format("%u bytes at offset %d lie outside of the block's %zu bytes of shared memory",
                   bytes, static_cast<int>(offset), block.shared.size()));
  if (offset % alignment != 0)
    fail_at(warp, o, ErrorKind::Misuse,
            format("shared offset %u is not a multiple of %u", offset, alignment));
  if (&block != warp.block && block.live_warps == 0)
    fail_at(warp, o, ErrorKind::Misuse, format("block %u of the cluster has exited", block.rank));
  return {&block, offset};
}

Accessor accessor(const Warp& warp, uint32_t lane) {
  return {warp.agent,        lane,  &warp.knows.ordinary, &warp.knows.ordinary, warp.now(),
          warp.synchronised, false, &warp.knows.performed};
}

namespace {

enum class Space : uint32_t { kGlobal, kShared, kParameter };

struct Element {
  unsigned char* bytes;
  bool defined;
};

// Where a lane's access is. Throws if it may not be there.
Element element(Warp& warp, const Operation& o, uint32_t lane, bool writes) {
  const uint32_t bytes = o.bytes * static_cast<uint32_t>(o.list.size());
  if (warp.undefined[o.a] >> lane & 1)
    fail_at(warp, o, ErrorKind::Uninitialised, format("lane %u has an undefined address", lane));
  if (Space{o.mode} == Space::kShared) {
    const uint32_t address = warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset);
    const Place place = shared_place(warp, o, address, bytes, bytes);
    Shadow& shadow = place.block->shadow;
    const std::string wrong = writes ? shadow.write(place.offset, bytes, accessor(warp, lane))
                                     : shadow.read(place.offset, bytes, accessor(warp, lane));
    if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
    return {place.block->shared.data() + place.offset, shadow.defined(place.offset, bytes)};
  }
  auto* pointer = reinterpret_cast<unsigned char*>(warp.lanes_of<uint64_t>(o.a)[lane] + o.offset);
  if (Space{o.mode} == Space::kParameter) return {pointer, true};
  const std::vector<unsigned char>& own = warp.block->cluster->grid->parameters;
  if (pointer >= own.data() && pointer + bytes <= own.data() + own.size() && !writes)
    return {pointer, true};  // a generic address of a parameter
  check_global(pointer, bytes, bytes, writes ? "store" : "load");
  GlobalMemory& global = global_memory();
  const auto access = o.atomic ? GlobalMemory::kAtomic : GlobalMemory::kPlain;
  demand(warp, o,
         writes ? global.write(warp, lane, pointer, bytes, access)
                : global.read(warp, lane, pointer, bytes, access));
  if (o.atomic && writes) global.release(warp, pointer, o.releases);
  if (o.atomic && !writes) global.acquire(warp, pointer, o.acquires);
  return {pointer, true};
}

uint64_t read_element(const unsigned char* from, uint32_t bytes, bool sign) {
  uint64_t value = 0;
  std::memcpy(&value, from, bytes);
  if (sign && bytes < 8) {
    const uint64_t top = uint64_t{1} << (bytes * 8 - 1);
    value = (value ^ top) - top;
  }
  return value;
}

void write_lane(Warp& warp, uint32_t slot, uint32_t bits, uint32_t lane, uint64_t value) {
  if (bits == 16) warp.lanes_of<uint16_t>(slot)[lane] = static_cast<uint16_t>(value);
  if (bits == 32) warp.lanes_of<uint32_t>(slot)[lane] = static_cast<uint32_t>(value);
  if (bits == 64) warp.lanes_of<uint64_t>(slot)[lane] = value;
}

Step load(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const Element from = element(warp, o, lane, false);
    for (size_t i = 0; i < o.list.size(); ++i) {
      write_lane(warp, o.list[i], o.bits[i], lane,
                 read_element(from.bytes + i * o.bytes, o.bytes, o.sign));
      uint32_t& undefined = warp.undefined[o.list[i]];
      undefined = from.defined ? undefined & ~(1u << lane) : undefined | 1u << lane;
    }
  }
  return Step::kNext;
}

Step load_flag(Warp& warp, const Operation& o, uint32_t lanes) {
  load(warp, o, lanes);
  return Step::kYield;  // it may be a loop that waits for another
}

Step store(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const Element to = element(warp, o, lane, true);
    bool defined = true;
    for (size_t i = 0; i < o.list.size(); ++i) {
      std::memcpy(to.bytes + i * o.bytes, warp.file[o.list[i]].bytes + lane * o.bits[i] / 8,
                  o.bytes);
      defined = defined && !(warp.undefined[o.list[i]] >> lane & 1);
    }
    if (Space{o.mode} == Space::kShared) {
      const uint32_t address = warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset);
      const uint32_t bytes = o.bytes * static_cast<uint32_t>(o.list.size());
      const Place place = shared_place(warp, o, address, bytes, bytes);
      place.block->shadow.set_defined(place.offset, bytes, defined);
    } else if (!defined) {
      std::memset(to.bytes, kPoisonByte, o.bytes * o.list.size());
    }
  }
  return Step::kNext;
}

// ld or st, then modifiers in PTX's order; the last is the type.
void make_access(Decoder& decoder, const Statement& statement, Operation& made) {
  decoder.demand_operands(statement, 2);
  std::istringstream words(statement.opcode);
  std::string word, type;
  std::getline(words, word, '.');
  const bool loads = word == "ld";
  size_t count = 1;
  Space space = Space::kGlobal;  // a generic address of global memory or of a parameter, or .global
  while (std::getline(words, word, '.')) {
    if (word == "shared" || word == "shared::cta" || word == "shared::cluster")
      space = Space::kShared;
    if (word == "param") space = Space::kParameter;
    if (word == "v2") count = 2;
    if (word == "v4") count = 4;
    type = word;
  }
  made.bytes = static_cast<uint32_t>(std::stoi(type.substr(1))) / 8;
  made.sign = type[0] == 's';
  made.mode = static_cast<uint32_t>(space);
  const Operand &first = statement.operands[0], &second = statement.operands[1];
  const Operand& registers = loads ? first : second;
  decoder.address(loads ? second : first, made, space == Space::kShared ? 32 : 64);
  const std::vector<Operand> parts =
      registers.kind == Operand::kVector ? registers.parts : std::vector<Operand>{registers};
  if (parts.size() != count) decoder.refuse("expected " + std::to_string(count) + " elements");
  for (const Operand& part : parts) {
    const int least = static_cast<int>(made.bytes) * 8;
    const int bits = part.kind == Operand::kImmediate ? std::max(16, least) : decoder.bits_of(part);
    if (bits < least || (type[0] == 'f' && bits != least))
      decoder.refuse("a register of " + std::to_string(bits) + " bits is too small for " + type);
    made.list.push_back(loads ? decoder.result(part, bits) : decoder.source(part, bits));
    made.bits.push_back(static_cast<uint32_t>(bits));
  }
  made.run = loads ? load : store;
  const auto has = [&](const char* what) {
    return statement.opcode.find(what) != std::string::npos;
  };
  // A volatile access is a relaxed one (PTX ISA, "ld.volatile"). Of a narrower scope than the GPU it
  // orders nothing between blocks.
  made.atomic = has("volatile") || has("acquire") || has("relaxed");
  made.acquires = has("acquire.gpu");
  if (made.atomic && loads) made.run = load_flag;
}

// atom and red on 32 bits of global memory.
enum class Atomic : uint32_t { kAdd, kExchange };
Step atomic(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    auto* pointer = reinterpret_cast<uint32_t*>(warp.lanes_of<uint64_t>(o.a)[lane] + o.offset);
    if ((warp.undefined[o.a] | warp.undefined[o.b]) >> lane & 1)
      fail_at(warp, o, ErrorKind::Uninitialised, "an undefined operand");
    check_global(pointer, 4, 4, "atomic");
    GlobalMemory& global = global_memory();
    demand(warp, o, global.read(warp, lane, pointer, 4, GlobalMemory::kAtomic));
    demand(warp, o, global.write(warp, lane, pointer, 4, GlobalMemory::kAtomic));
    if (o.atomic)
      global.acquire(warp, pointer, o.acquires), global.release(warp, pointer, o.releases);
    const uint32_t before = *pointer, operand = warp.lanes_of<uint32_t>(o.b)[lane];
    *pointer = Atomic{o.mode} == Atomic::kAdd ? before + operand : operand;
    if (o.d == kNone) continue;
    warp.lanes_of<uint32_t>(o.d)[lane] = before;
    warp.define(o.d, 1u << lane);
  }
  return Step::kYield;
}
Maker make_atomic(Atomic what, bool returns) {
  return [=](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, returns ? 3 : 2);
    if (returns) made.d = decoder.result(statement.operands[0], 32);
    decoder.address(statement.operands[returns], made, 64);
    made.b = decoder.source(statement.operands[returns + 1], 32);
    made.mode = static_cast<uint32_t>(what), made.run = atomic;
    const auto has = [&](const char* it) { return statement.opcode.find(it) != std::string::npos; };
    made.atomic = !has(".cta");  // without a scope, it is the GPU's (PTX ISA, "atom")
    made.releases = has("release.gpu") || has("acq_rel.gpu");
    made.acquires = has("acquire.gpu") || has("acq_rel.gpu");
  };
}

}  // namespace

void add_memory(Table& table) {
  const auto add = [&](const std::string& what) {
    for (const char* type : {"u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64",
                             "s64", "b64", "f32", "f64"})
      for (const char* vector : {"", ".v2", ".v4"}) table[what + vector + "." + type] = make_access;
  };
  for (const char* space : {"", ".global", ".shared", ".shared::cta", ".shared::cluster"})
    add(std::string("ld") + space), add(std::string("st") + space);
  add("ld.param"), add("ld.global.nc"), add("ld.volatile.global"), add("st.volatile.global");
  for (const char* order : {"acquire.gpu", "acquire.cta", "relaxed.gpu"})
    table["ld." + std::string(order) + ".global.u32"] = make_access;
  for (const char* order : {"release.gpu.", "release.cta.", "relaxed.gpu."})
    table["red." + std::string(order) + "global.add.u32"] = make_atomic(Atomic::kAdd, false);
  for (const char* order : {"relaxed.gpu.", "relaxed.cta.", "", "acq_rel.gpu."})
    table["atom." + std::string(order) + "global.add.u32"] = make_atomic(Atomic::kAdd, true);
  table["atom.global.exch.b32"] = make_atomic(Atomic::kExchange, true);
}

}  // namespace emulator::ptx
