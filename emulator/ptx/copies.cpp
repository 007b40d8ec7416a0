// cp.async, in groups.
#include "emulator/ptx/copies.h"

#include "emulator/counts/counters.h"
#include "emulator/memory/global_memory.h"
#include "emulator/ptx/global.h"

namespace emulator::ptx {
namespace {

void land(Warp& warp, const Operation& o, Copy& copy) {
  if (copy.landed) return;
  unsigned char* to = warp.block->shared.data() + copy.destination;
  std::memset(to, 0, 16);
  if (copy.bytes > 0) check_global(copy.source, copy.bytes, 16, "cp.async");
  std::memcpy(to, copy.source, copy.bytes);
  copy.landed = true;
  (void)o;
}

Step copy_16(Warp& warp, const Operation& o, uint32_t lanes) {
  Grid& grid = *warp.block->cluster->grid;
  const uint32_t undefined = warp.undefined[o.a] | warp.undefined[o.b] | warp.undefined[o.c];
  if (undefined & lanes) fail_at(warp, o, ErrorKind::Uninitialised, "an undefined operand");
  if (warp.copies.empty()) warp.copies.emplace_back();
  for (const uint32_t lane : Lanes(lanes)) {
    const uint32_t address = warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset);
    const Place place = shared_place(warp, o, address, 16, 16);
    const uint32_t bytes = warp.lanes_of<uint32_t>(o.c)[lane];
    if (bytes > 16) fail_at(warp, o, ErrorKind::Misuse, format("%u bytes of 16", bytes));
    Shadow& shadow = place.block->shadow;
    demand(warp, o, shadow.write(place.offset, 16, accessor(warp, lane)));
    shadow.set_in_flight(place.offset, 16);
    count_global(GlobalAccess::CpAsync, bytes);
    Copy copy{place.offset,
              reinterpret_cast<const unsigned char*>(warp.lanes_of<uint64_t>(o.b)[lane]), bytes};
    if (lands_at_once(grid)) {
      land(warp, o, copy);
    } else {
      std::memset(place.block->shared.data() + place.offset, kPoisonByte, 16);
    }
    demand(warp, o, global_memory().read(warp, lane, copy.source, bytes, GlobalMemory::kPlain));
    copy.lane = static_cast<uint8_t>(lane);
    warp.copies.back().push_back(copy);
  }
  return Step::kNext;
}

Step commit(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  if (warp.copies.empty()) warp.copies.emplace_back();
  warp.copies.emplace_back();
  return Step::kNext;
}

Step wait_group(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  while (warp.copies.size() > o.mode + 1) {
    for (Copy& copy : warp.copies.front()) {
      land(warp, o, copy);
      Shadow& shadow = warp.block->shadow;
      shadow.set_defined(copy.destination, 16, true);
      demand(warp, o, shadow.write(copy.destination, 16, accessor(warp, copy.lane)));
    }
    warp.copies.pop_front();
  }
  return Step::kNext;
}

}  // namespace

void check_copies(Warp& warp, const Operation& o) {
  for (const auto& group : warp.copies)
    if (!group.empty())
      fail_at(warp, o, ErrorKind::ExitCheck, "exits without waiting for cp.async");
}

void add_copies(Table& table) {
  table["cp.async.cg.shared.global"] = [](Decoder& decoder, const Statement& statement,
                                          Operation& made) {
    decoder.demand_operands(statement, 4);
    if (decoder.constant(statement.operands[2]) != 16) decoder.refuse("expected 16 bytes");
    Operation source;
    decoder.address(statement.operands[1], source, 64);
    if (source.offset != 0) decoder.refuse("expected a source without an offset");
    decoder.address(statement.operands[0], made, 32);
    made.b = source.a, made.c = decoder.source(statement.operands[3], 32), made.run = copy_16;
  };
  table["cp.async.commit_group"] = group_operation(commit, 0);
  table["cp.async.wait_group"] = group_operation(wait_group, 1);
}

}  // namespace emulator::ptx
