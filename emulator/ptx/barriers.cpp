// Barriers of blocks, warps and clusters, and fences.
#include "emulator/ptx/global.h"
#include "emulator/ptx/loops.h"

namespace emulator::ptx {

namespace {

// ---- bar.sync and bar.arrive --------------------------------------------------------------------

// a: the barrier, b: how many threads; mode: only arrive.
Step bar(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  const uint32_t id = warp.lanes_of<uint32_t>(o.a)[__builtin_ctz(lanes)];
  if (id >= 16) fail_at(warp, o, ErrorKind::Misuse, format("barrier %u of 16", id));
  NamedBarrier& barrier = warp.block->barriers[id];
  if (!warp.waits_at(&barrier)) {
    const uint32_t all = (warp.block->threads + 31) / 32 * 32;
    const uint32_t expected =
        o.b == kNone ? all : warp.lanes_of<uint32_t>(o.b)[__builtin_ctz(lanes)];
    if (expected == 0 || expected % 32 != 0 || expected > all)
      fail_at(warp, o, ErrorKind::Misuse, format("a barrier of %u threads", expected));
    if (barrier.arrived != 0 && barrier.expected != expected)
      fail_at(warp, o, ErrorKind::Misuse,
              format("barrier %u is of %u threads here and of %u elsewhere", id, expected,
                     barrier.expected));
    barrier.expected = expected;
    barrier.gathered.learn(warp.knows);
    warp.phase = barrier.phase;
    barrier.arrived += 32;
    if (barrier.arrived == expected) {
      barrier.arrived = 0, ++barrier.phase;
      barrier.released = std::move(barrier.gathered);
      barrier.gathered = {};
    }
    if (o.mode != 0) return warp.meet(), Step::kNext;
    warp.waiting = &barrier;
  }
  if (barrier.phase == warp.phase)
    return blocked(warp,
                   format("barrier %u: %u of %u threads", id, barrier.arrived, barrier.expected));
  warp.waiting = nullptr;
  warp.knows.learn(barrier.released);
  warp.meet();
  return Step::kYield;
}

Step bar_warp(Warp& warp, const Operation& o, uint32_t lanes) {
  const uint32_t named = warp.lanes_of<uint32_t>(o.a)[__builtin_ctz(lanes)];
  if ((named & warp.lanes) != lanes)
    fail_at(warp, o, ErrorKind::Misuse,
            format("lanes 0x%x meet, but 0x%x are named", lanes, named));
  warp.meet();
  return Step::kNext;
}

// ---- clusters -----------------------------------------------------------------------------------

Step cluster_arrive(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  Cluster& cluster = *warp.block->cluster;
  NamedBarrier& barrier = cluster.barrier;
  // A relaxed arrival publishes what a release fence before it covers.
  barrier.gathered.learn(o.mode == 0 ? warp.knows : warp.released);
  warp.cluster_phase = barrier.phase + 1;
  uint32_t warps = 0;
  for (const auto& block : cluster.blocks) warps += static_cast<uint32_t>(block->warps.size());
  if (++barrier.arrived == warps) {
    barrier.arrived = 0, ++barrier.phase;
    barrier.released = std::move(barrier.gathered);
    barrier.gathered = {};
  }
  warp.meet();
  return Step::kNext;
}

Step cluster_wait(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  NamedBarrier& barrier = warp.block->cluster->barrier;
  if (warp.cluster_phase == 0)
    fail_at(warp, o, ErrorKind::Misuse, "waits at the cluster's barrier without an arrival");
  if (barrier.phase < warp.cluster_phase)
    return blocked(warp, format("the cluster's barrier: %u warps have arrived", barrier.arrived));
  warp.cluster_phase = 0;
  warp.knows.learn(barrier.released);
  warp.meet();
  return Step::kYield;
}

Step map_address(Warp& warp, const Operation& o, uint32_t lanes) {
  uint32_t* d = warp.lanes_of<uint32_t>(o.d);
  const uint32_t *a = warp.lanes_of<uint32_t>(o.a), *rank = warp.lanes_of<uint32_t>(o.b);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = a[lane] | (rank[lane] + 1) << kRankShift; });
  follow(warp, lanes, o.d, o.a, o.b);
  return Step::kNext;
}

// ---- fences and the like ------------------------------------------------------------------------

enum class Fence : uint32_t {
  kNone,
  kProxy,
  kGlobalProxy,
  kInit,
  kGpu,
  kWait,
  kDependents,
  kWhole
};
Step fence(Warp& warp, const Operation& o, uint32_t lanes) {
  switch (Fence{o.mode}) {
    case Fence::kProxy:
      join(warp.knows.proxy, warp.knows.ordinary);
      break;
    case Fence::kInit:
      for (auto& [offset, each] : warp.block->mbarriers) each.fenced = true;
      warp.released = warp.knows;
      warp.tick();
      break;
    case Fence::kWhole:
      demand_whole_warp(warp, o, lanes);
      break;
    case Fence::kGlobalProxy:
      global_memory().proxy_fence(warp);
      break;
    case Fence::kGpu:
      global_memory().fence(warp);
      return Step::kYield;
    case Fence::kWait:
      global_memory().wait_for_grids(warp);
      break;
    case Fence::kDependents:
      global_memory().launch_dependents(warp);
      break;
    case Fence::kNone:
      break;
  }
  return Step::kNext;
}
Maker make_fence(Fence what) {
  return [=](Decoder&, const Statement&, Operation& made) {
    made.run = fence, made.mode = static_cast<uint32_t>(what);
  };
}

}  // namespace

void add_barriers(Table& table) {
  for (const bool arrives : {false, true}) {
    table[arrives ? "bar.arrive" : "bar.sync"] = [=](Decoder& decoder, const Statement& statement,
                                                     Operation& made) {
      if (arrives || statement.operands.size() != 1) decoder.demand_operands(statement, 2);
      made.a = decoder.source(statement.operands[0], 32);
      if (statement.operands.size() == 2) made.b = decoder.source(statement.operands[1], 32);
      made.run = bar, made.mode = arrives;
    };
  }
  table["bar.warp.sync"] = [](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, 1);
    made.a = decoder.source(statement.operands[0], 32), made.run = bar_warp;
  };
  const auto of_cluster = [&](const char* opcode, Run run, uint32_t mode) {
    table[opcode] = [=](Decoder&, const Statement&, Operation& made) {
      made.run = run, made.mode = mode;
    };
  };
  of_cluster("barrier.cluster.arrive", cluster_arrive, 0);
  of_cluster("barrier.cluster.arrive.relaxed", cluster_arrive, 1);
  of_cluster("barrier.cluster.wait", cluster_wait, 0);
  table["mapa.shared::cluster.u32"] = plain(map_address, {32, 32, 32});
  table["fence.proxy.async.shared::cta"] = make_fence(Fence::kProxy);
  table["fence.proxy.async.global"] = make_fence(Fence::kGlobalProxy);
  table["fence.mbarrier_init.release.cluster"] = make_fence(Fence::kInit);
  table["fence.acq_rel.gpu"] = make_fence(Fence::kGpu);
  table["fence.acq_rel.cta"] = make_fence(Fence::kNone);  // orders nothing between blocks
  table["griddepcontrol.wait"] = make_fence(Fence::kWait);
  table["griddepcontrol.launch_dependents"] = make_fence(Fence::kDependents);
  table["prefetch.tensormap"] = make_fence(Fence::kNone);
  for (const char* which : {"inc", "dec"})
    table[std::string("setmaxnreg.") + which + ".sync.aligned.u32"] = make_fence(Fence::kWhole);
  table["ret"] =
      table["exit"] = [](Decoder&, const Statement&, Operation& made) { made.kind = kExit; };
}

}  // namespace emulator::ptx
