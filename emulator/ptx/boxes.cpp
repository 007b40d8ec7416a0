// Tensor copies of boxes: to shared memory, where they complete at an mbarrier, and back.
#include "emulator/copies/box.h"
#include "emulator/memory/global_memory.h"
#include "emulator/ptx/copies.h"
#include "emulator/ptx/global.h"

namespace emulator::ptx {

struct BulkStore {
  Box box;
  Block* block;
  uint32_t offset;
  std::vector<unsigned char> values;
  bool read = false, written = false, waited = false;  // for the read
};

namespace {

void land_rows(const Box& box, Block& block, uint32_t offset, uint32_t begin, uint32_t end) {
  const TensorMap& map = box.map;
  const uint32_t row_bytes = map.box_row_bytes();
  std::vector<unsigned char> values(row_bytes);
  for (uint32_t row = begin; row < end; ++row) {
    std::fill(values.begin(), values.end(), 0);
    if (box.row_inside(row)) {
      const uint8_t* source = box.global_row(row);
      check_global(source, box.inside_bytes(), map.element_bytes, "tensor copy");
      std::memcpy(values.data() + box.first_column() * map.element_bytes, source,
                  box.inside_bytes());
    }
    for_each_chunk(map, block.shared.data(), offset, row, [&](unsigned char* chunk, uint32_t at) {
      std::memcpy(chunk, values.data() + at, kChunk);
    });
  }
  block.shadow.set_defined(offset + begin * row_bytes, (end - begin) * row_bytes, true);
}

void issue(Warp& warp, const Operation& o, uint32_t lane, const Box& box, Block& block,
           uint32_t offset, Mbarrier& mbarrier) {
  Cluster& cluster = *warp.block->cluster;
  const uint32_t bytes = box.map.box_bytes(), warps = cluster.agents - cluster.blocks.size();
  const uint32_t agent = warps + block.rank, time = ++cluster.copies[block.rank];
  demand(warp, o,
         block.shadow.write(offset, bytes,
                            {agent, lane, &warp.knows.proxy, &warp.knows.ordinary, time, 0, true,
                             &warp.knows.performed}));
  block.shadow.set_in_flight(offset, bytes);
  std::memset(block.shared.data() + offset, kPoisonByte, bytes);
  const uint32_t height = box.map.box_height, middle = height / 2;
  for (const auto& [begin, end] : {std::pair{0u, middle}, std::pair{middle, height}}) {
    if (begin == end) continue;
    const auto happen = [=, &block, &mbarrier] {
      land_rows(box, block, offset, begin, end);
      Knowledge landed;
      landed.ordinary.resize(agent + 1), landed.ordinary[agent] = time;
      landed.proxy = landed.ordinary;
      mbarrier.gathered.learn(landed);
      arrive(mbarrier, 0, -static_cast<int64_t>((end - begin) * box.map.box_row_bytes()));
    };
    if (lands_at_once(*cluster.grid)) {
      happen();
    } else {
      cluster.grid->in_flight.push_back(happen);
    }
  }
}

Box box_of(Warp& warp, const Operation& o, uint32_t lane, uint32_t offset) {
  for (const uint32_t slot : {o.a, o.b, o.list[0], o.list[1]})
    if (slot != kNone && warp.undefined[slot] >> lane & 1)
      fail_at(warp, o, ErrorKind::Uninitialised, "an undefined operand");
  const auto* map = reinterpret_cast<const CUtensorMap*>(warp.lanes_of<uint64_t>(o.a)[lane]);
  return make_box(map, static_cast<int32_t>(warp.lanes_of<uint32_t>(o.list[0])[lane]),
                  static_cast<int32_t>(warp.lanes_of<uint32_t>(o.list[1])[lane]), offset,
                  "tensor copy");
}

// Rows that a load of a box reads.
void read_rows(Warp& warp, const Operation& o, uint32_t lane, const Box& box) {
  for (uint32_t row = 0; row < box.map.box_height; ++row)
    if (box.row_inside(row))
      demand(warp, o,
             global_memory().read(warp, lane, box.global_row(row), box.inside_bytes(),
                                  GlobalMemory::kAsync));
}

// d: the destination, a: the map, list: x and y, b: the mbarrier, c: the mask of blocks.
Step load_box(Warp& warp, const Operation& o, uint32_t lanes) {
  Cluster& cluster = *warp.block->cluster;
  for (const uint32_t lane : Lanes(lanes)) {
    if (warp.undefined[o.d] >> lane & 1)
      fail_at(warp, o, ErrorKind::Uninitialised, "an undefined destination");
    const uint32_t to = warp.lanes_of<uint32_t>(o.d)[lane], at = warp.lanes_of<uint32_t>(o.b)[lane];
    const Box box = box_of(warp, o, lane, shared_place(warp, o, to, 1, 1).offset + kSharedBase);
    const Place place = shared_place(warp, o, to, box.map.box_bytes(), kSharedAlignment);
    const Place bar = shared_place(warp, o, at, 8, 8);
    if (place.block != bar.block)
      fail_at(warp, o, ErrorKind::Misuse, "destination and mbarrier lie in different blocks");
    const uint32_t mask =
        o.c == kNone ? 1u << place.block->rank : warp.lanes_of<uint16_t>(o.c)[lane];
    count_box(box, GlobalAccess::TmaLoad);
    read_rows(warp, o, lane, box);
    if (mask == 0 || mask >> cluster.blocks.size() != 0)
      fail_at(warp, o, ErrorKind::Misuse,
              format("block mask 0x%x; the cluster has %zu blocks", mask, cluster.blocks.size()));
    for (const auto& block : cluster.blocks) {
      if (!(mask >> block->rank & 1)) continue;
      Mbarrier& mbarrier = mbarrier_at(warp, o, {block.get(), bar.offset});
      if (!mbarrier.fenced)
        fail_at(warp, o, ErrorKind::Misuse, "no fence.mbarrier_init after the mbarrier's init");
      issue(warp, o, lane, box, *block, place.offset, mbarrier);
    }
  }
  return Step::kNext;
}

// ---- and back to global memory ------------------------------------------------------------------

void read_source(Warp& warp, const Operation& o, BulkStore& store) {
  if (store.read) return;
  const TensorMap& map = store.box.map;
  store.values.resize(map.box_bytes());
  for (uint32_t row = 0; row < map.box_height; ++row) {
    for_each_chunk(
        map, store.block->shared.data(), store.offset, row, [&](unsigned char* chunk, uint32_t at) {
          std::memcpy(store.values.data() + row * map.box_row_bytes() + at, chunk, kChunk);
        });
  }
  if (store.block->shadow.in_flight(store.offset, map.box_bytes()))
    fail_at(warp, o, ErrorKind::Race, "the source of a store is overwritten before it was read");
  store.read = true;
}

void write_destination(BulkStore& store) {
  if (store.written) return;
  const TensorMap& map = store.box.map;
  for (uint32_t row = 0; row < map.box_height; ++row) {
    if (!store.box.row_inside(row)) continue;
    uint8_t* to = store.box.global_row(row);
    check_global(to, store.box.stored_bytes(), kChunk, "tensor copy to global memory");
    std::memcpy(to,
                store.values.data() + row * map.box_row_bytes() +
                    store.box.first_column() * map.element_bytes,
                store.box.stored_bytes());
  }
  store.written = true;
}

// The rows that a store of a box writes; until it has been waited for, nobody else may touch them.
void write_rows(Warp& warp, const Operation& o, const Box& box, bool complete) {
  for (uint32_t row = 0; row < box.map.box_height; ++row)
    if (box.row_inside(row))
      demand(warp, o,
             global_memory().write(warp, 0, box.global_row(row), box.stored_bytes(),
                                   GlobalMemory::kAsync, complete));
}

// The async proxy reads a source, or has read it.
void note_read(Warp& warp, const Operation& o, const BulkStore& store) {
  demand(warp, o,
         store.block->shadow.read(
             store.offset, store.box.map.box_bytes(),
             {warp.agent, 0, &warp.knows.proxy, &warp.knows.ordinary, warp.now(), 0, true}));
}

Step store_box(Warp& warp, const Operation& o, uint32_t lanes) {
  for (const uint32_t lane : Lanes(lanes)) {
    const uint32_t from = warp.lanes_of<uint32_t>(o.b)[lane];
    auto store = std::make_shared<BulkStore>();
    store->box = box_of(warp, o, lane, shared_place(warp, o, from, 1, 1).offset + kSharedBase);
    const Place place = shared_place(warp, o, from, store->box.map.box_bytes(), kSharedAlignment);
    store->block = place.block, store->offset = place.offset;
    count_box(store->box, GlobalAccess::TmaStore);
    note_read(warp, o, *store);
    write_rows(warp, o, store->box, false);
    if (lands_at_once(*warp.block->cluster->grid)) read_source(warp, o, *store);
    if (warp.stores.empty()) warp.stores.emplace_back();
    warp.stores.back().push_back(store);
  }
  return Step::kNext;
}

Step commit_bulk(Warp& warp, const Operation&, uint32_t) {
  if (warp.stores.empty()) warp.stores.emplace_back();
  warp.stores.emplace_back();
  return Step::kNext;
}

// The groups but the last `mode`, which is open, are read, or also written.
Step wait_bulk(Warp& warp, const Operation& o, uint32_t) {
  const size_t left = o.mode + 1;
  for (size_t i = 0; i + left < warp.stores.size(); ++i) {
    for (const auto& store : warp.stores[i]) {
      read_source(warp, o, *store);
      if (!store->waited) note_read(warp, o, *store);
      store->waited = true;
      if (!o.sign || store->written) continue;
      write_destination(*store);
      write_rows(warp, o, store->box, true);
    }
  }
  return Step::kNext;
}

void take_map(Decoder& decoder, const Operand& operand, Operation& made) {
  decoder.address(operand, made, 64);
  if (operand.parts.size() != 2 || operand.parts[1].parts.size() != 2 || operand.value != 0)
    decoder.refuse("expected a map and two coordinates");
  for (const Operand& each : operand.parts[1].parts) made.list.push_back(decoder.source(each, 32));
}
uint32_t plain_address(Decoder& decoder, const Operand& operand) {
  Operation found;
  decoder.address(operand, found, 32);
  if (found.offset != 0) decoder.refuse("expected an address without an offset");
  return found.a;
}

void make_load_box(Decoder& decoder, const Statement& statement, Operation& made) {
  const bool multicast = statement.opcode.ends_with(".multicast::cluster");
  decoder.demand_operands(statement, multicast ? 4 : 3);
  take_map(decoder, statement.operands[1], made);
  made.d = plain_address(decoder, statement.operands[0]);
  made.b = plain_address(decoder, statement.operands[2]);
  if (multicast) made.c = decoder.source(statement.operands[3], 16);
  made.run = load_box;
}

}  // namespace

void check_stores(Warp& warp, const Operation& o) {
  for (const auto& group : warp.stores) {
    for (const auto& store : group) {
      if (!store->waited)
        fail_at(warp, o, ErrorKind::ExitCheck, "exits without waiting until its stores have read");
      write_destination(*store);  // at the latest by the end of the grid
    }
  }
}

void add_boxes(Table& table) {
  const std::string load =
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes";
  table[load] = table[load + ".multicast::cluster"] = make_load_box;
  table["cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"] =
      [](Decoder& decoder, const Statement& statement, Operation& made) {
        decoder.demand_operands(statement, 2);
        take_map(decoder, statement.operands[0], made);
        made.b = plain_address(decoder, statement.operands[1]), made.run = store_box;
      };
  table["cp.async.bulk.commit_group"] = group_operation(commit_bulk, 0);
  table["cp.async.bulk.wait_group"] = group_operation(wait_bulk, 1);
  table["cp.async.bulk.wait_group.read"] = group_operation(wait_bulk, 1);
}

}  // namespace emulator::ptx
