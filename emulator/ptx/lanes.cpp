// What lanes of a warp exchange: shuffles, votes, an elected lane.
#include "emulator/ptx/loops.h"

namespace emulator::ptx {
namespace {

Step elect(Warp& warp, const Operation& o, uint32_t lanes) {
  warp.predicate(o.d) = (warp.predicate(o.d) & ~lanes) | (lanes & (0u - lanes));
  warp.define(o.d, lanes);
  return Step::kNext;
}

Step ballot(Warp& warp, const Operation& o, uint32_t lanes) {
  const uint32_t votes = warp.predicate(o.a) & lanes;
  uint32_t* d = warp.lanes_of<uint32_t>(o.d);
  const bool undefined = warp.undefined[o.a] & lanes;
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = votes; });
  warp.undefined[o.d] = undefined ? warp.undefined[o.d] | lanes : warp.undefined[o.d] & ~lanes;
  return Step::kNext;
}

// shfl.sync: of which lane, and whether it is in range (PTX ISA, "shfl.sync").
enum class Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };
Step shuffle(Warp& warp, const Operation& o, uint32_t lanes) {
  const uint32_t named = warp.lanes_of<uint32_t>(o.list[1])[__builtin_ctz(lanes)];
  if ((named & warp.lanes) != lanes)
    fail_at(warp, o, ErrorKind::Misuse,
            format("lanes 0x%x meet, but 0x%x are named", lanes, named));
  uint32_t values[kLanes];
  std::memcpy(values, warp.file[o.a].bytes, sizeof values);
  const uint32_t undefined = warp.undefined[o.a] | ~lanes;
  for_lanes(lanes, [&](uint32_t lane) {
    const uint32_t b = warp.lanes_of<uint32_t>(o.b)[lane] & 31;
    const uint32_t c = warp.lanes_of<uint32_t>(o.c)[lane];
    const uint32_t clamp = c & 31, segment = c >> 8 & 31;
    const uint32_t most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    uint32_t from = lane;
    bool inside = false;
    switch (Shuffle{o.mode}) {
      case Shuffle::kUp:
        from = lane - b,
        inside = static_cast<int>(lane) - static_cast<int>(b) >= static_cast<int>(most);
        break;
      case Shuffle::kDown:
        from = lane + b, inside = from <= most;
        break;
      case Shuffle::kButterfly:
        from = lane ^ b, inside = from <= most;
        break;
      case Shuffle::kIndex:
        from = least | (b & ~segment), inside = from <= most;
        break;
    }
    if (!inside) from = lane;
    warp.lanes_of<uint32_t>(o.d)[lane] = values[from];
    warp.undefined[o.d] = (warp.undefined[o.d] & ~(1u << lane)) | (undefined >> from & 1) << lane;
    if (o.list[0] == kNone) return;
    uint32_t& p = warp.predicate(o.list[0]);
    p = (p & ~(1u << lane)) | uint32_t{inside} << lane;
    warp.define(o.list[0], 1u << lane);
  });
  return Step::kNext;
}

Maker make_shuffle(Shuffle what) {
  return [=](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, 5);
    const Operand& to = statement.operands[0];
    const bool pair = to.kind == Operand::kPair;
    made.d = decoder.result(pair ? to.parts[0] : to, 32);
    made.list = {pair ? decoder.result(to.parts[1], 1) : kNone,
                 decoder.source(statement.operands[4], 32)};
    made.a = decoder.source(statement.operands[1], 32);
    made.b = decoder.source(statement.operands[2], 32);
    made.c = decoder.source(statement.operands[3], 32);
    made.run = shuffle, made.mode = static_cast<uint32_t>(what);
  };
}

}  // namespace

void add_lanes(Table& table) {
  table["elect.sync"] = [](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, 2);
    const Operand& to = statement.operands[0];
    if (to.kind != Operand::kPair || to.parts[0].kind != Operand::kSink)
      decoder.refuse("expected _|p");
    made.d = decoder.result(to.parts[1], 1), made.run = elect;
  };
  table["vote.sync.ballot.b32"] = [](Decoder& decoder, const Statement& statement,
                                     Operation& made) {
    decoder.demand_operands(statement, 3);
    made.d = decoder.result(statement.operands[0], 32);
    made.a = decoder.source(statement.operands[1], 1), made.run = ballot;
  };
  table["shfl.sync.up.b32"] = make_shuffle(Shuffle::kUp);
  table["shfl.sync.down.b32"] = make_shuffle(Shuffle::kDown);
  table["shfl.sync.bfly.b32"] = make_shuffle(Shuffle::kButterfly);
  table["shfl.sync.idx.b32"] = make_shuffle(Shuffle::kIndex);
}

}  // namespace emulator::ptx
