// mbarriers: they count arrivals and the bytes of copies.
#include "emulator/ptx/loops.h"

namespace emulator::ptx {

void arrive(Mbarrier& mbarrier, uint32_t arrivals, int64_t bytes) {
  mbarrier.pending -= arrivals, mbarrier.bytes += bytes;
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  mbarrier.released.learn(mbarrier.gathered), mbarrier.of_peers.learn(mbarrier.gathered_of_peers);
  join(mbarrier.performed, mbarrier.gathered_performed);
}

Mbarrier& mbarrier_at(Warp& warp, const Operation& o, Place place) {
  const auto found = place.block->mbarriers.find(place.offset);
  if (found == place.block->mbarriers.end())
    fail_at(warp, o, ErrorKind::Misuse,
            format("no mbarrier was initialised at shared offset %u of block %u", place.offset,
                   place.block->rank));
  return found->second;
}

namespace {

Place place_of(Warp& warp, const Operation& o, uint32_t lane) {
  if (warp.undefined[o.a] >> lane & 1)
    fail_at(warp, o, ErrorKind::Uninitialised, "an undefined address");
  return shared_place(warp, o, warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset),
                      8, 8);
}

Step mbarrier_init(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const Place place = place_of(warp, o, lane);
    const std::string wrong = place.block->shadow.write(place.offset, 8, accessor(warp, lane));
    if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
    const uint32_t count = warp.lanes_of<uint32_t>(o.b)[lane];
    if (count == 0 || count >= 1u << 20)
      fail_at(warp, o, ErrorKind::Misuse, format("an mbarrier of %u arrivals", count));
    Mbarrier& made = place.block->mbarriers[place.offset];
    made = {};
    made.count = made.pending = count;
  }
  return Step::kNext;
}

// b: the bytes of expect_tx; mode: of the scope of the cluster.
Step mbarrier_arrive(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const Place place = place_of(warp, o, lane);
    Mbarrier& mbarrier = mbarrier_at(warp, o, place);
    if (place.block != warp.block && !mbarrier.fenced)
      fail_at(warp, o, ErrorKind::Misuse, "no fence.mbarrier_init after the mbarrier's init");
    const std::string wrong = place.block->shadow.read(place.offset, 8, accessor(warp, lane));
    if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
    if (mbarrier.pending == 0)
      fail_at(warp, o, ErrorKind::Misuse,
              format("an arrival too many: the phase expects %u", mbarrier.count));
    // An arrival is a release at the scope of the block unless it names another (PTX ISA,
    // "mbarrier.arrive", .scope): to another block it then says only that what the warp has waited for
    // is over, so that operands of wgmma may be overwritten.
    if (place.block == warp.block) {
      mbarrier.gathered.learn(warp.knows);
    } else if (o.mode != 0) {
      mbarrier.gathered_of_peers.learn(warp.knows);
    } else {
      join(mbarrier.gathered_performed, warp.knows.ordinary);
    }
    const int64_t bytes = o.b == kNone ? 0 : warp.lanes_of<uint32_t>(o.b)[lane];
    if (mbarrier.bytes + bytes >= 1 << 20)
      fail_at(warp, o, ErrorKind::Misuse, "more than 2^20 - 1 bytes are expected of a phase");
    arrive(mbarrier, 1, bytes);
  }
  warp.tick();
  return Step::kYield;
}

// d: the predicate, b: the parity; mode: of the scope of the cluster. It waits until the phase has
// completed.
Step mbarrier_wait(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const Place place = place_of(warp, o, lane);
    Mbarrier& mbarrier = mbarrier_at(warp, o, place);
    if (warp.undefined[o.b] >> lane & 1)
      fail_at(warp, o, ErrorKind::Uninitialised, "an undefined parity");
    const uint32_t parity = warp.lanes_of<uint32_t>(o.b)[lane];
    if (parity > 1) fail_at(warp, o, ErrorKind::Misuse, format("parity %u", parity));
    if ((mbarrier.phase & 1) == parity)
      return blocked(
          warp, format("mbarrier %u, parity %u: phase %llu, %u of %u arrivals and %lld "
                       "bytes pending",
                       place.offset, parity, static_cast<unsigned long long>(mbarrier.phase),
                       mbarrier.pending, mbarrier.count, static_cast<long long>(mbarrier.bytes)));
    const std::string wrong = place.block->shadow.read(place.offset, 8, accessor(warp, lane));
    if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
    warp.knows.learn(mbarrier.released);
    join(warp.knows.performed, mbarrier.performed);
    if (o.mode != 0) warp.knows.learn(mbarrier.of_peers);
    join(warp.knows.performed, mbarrier.of_peers.ordinary);
  }
  warp.predicate(o.d) |= lanes;
  warp.define(o.d, lanes);
  return Step::kNext;
}

Maker of_mbarrier(Run run, bool waits, bool sink, bool second, uint32_t mode) {
  return [=](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, size_t{1} + waits + sink + second);
    if (waits) made.d = decoder.result(statement.operands[0], 1);
    if (sink && statement.operands[0].kind != Operand::kSink) decoder.refuse("expected _");
    decoder.address(statement.operands[waits || sink], made, 32);
    if (second) made.b = decoder.source(statement.operands.back(), 32);
    made.run = run, made.mode = mode;
  };
}

}  // namespace

void add_mbarriers(Table& table) {
  table["mbarrier.init.shared::cta.b64"] = of_mbarrier(mbarrier_init, false, false, true, 0);
  table["mbarrier.arrive.shared::cluster.b64"] =
      of_mbarrier(mbarrier_arrive, false, true, false, 0);
  table["mbarrier.arrive.release.cta.shared::cluster.b64"] =
      of_mbarrier(mbarrier_arrive, false, true, false, 0);
  table["mbarrier.arrive.release.cluster.shared::cluster.b64"] =
      of_mbarrier(mbarrier_arrive, false, true, false, 1);
  table["mbarrier.arrive.expect_tx.shared::cta.b64"] =
      of_mbarrier(mbarrier_arrive, false, true, true, 0);
  for (const char* order : {"", ".acquire.cta", ".acquire.cluster"})
    table[std::string("mbarrier.try_wait.parity") + order + ".shared::cta.b64"] =
        of_mbarrier(mbarrier_wait, true, false, true, std::string(order).ends_with(".cluster"));
}

}  // namespace emulator::ptx
