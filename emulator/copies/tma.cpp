// TMA loads and stores as steps of the asynchronous engine; see tma.h.
#include "emulator/copies/tma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "emulator/copies/box.h"
#include "emulator/copies/mbarrier.h"
#include "emulator/counts/counters.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/race/race.h"

namespace emulator {
namespace {

// ---- loads --------------------------------------------------------------------------------------

// Rows [begin, end) of a box on their way to one block.
struct Part {
  Box box;
  Block* block;
  uint32_t offset, mbarrier;  // of the whole box
  uint32_t begin, end;
  AsyncAgent agent;
  const char* what;
};

void land(const Part& part) {
  const TensorMap& map = part.box.map;
  const uint32_t row_bytes = map.box_row_bytes();
  const uint32_t bytes = (part.end - part.begin) * row_bytes;
  unsigned char* landed = part.block->shared + part.offset + part.begin * row_bytes;
  race_in_flight(landed, bytes, false);
  race_async_write(part.agent, landed, bytes, part.what);
  std::vector<unsigned char> values(row_bytes);
  for (uint32_t row = part.begin; row < part.end; ++row) {
    std::fill(values.begin(), values.end(), 0);
    if (part.box.row_inside(row)) {
      const uint8_t* source = part.box.global_row(row);
      check_global(source, part.box.inside_bytes(), map.element_bytes, part.what);
      race_async_read(part.agent, source, part.box.inside_bytes(), part.what);
      std::memcpy(values.data() + part.box.first_column() * map.element_bytes, source,
                  part.box.inside_bytes());
    }
    for_each_chunk(map, part.block->shared, part.offset, row,
                   [&](unsigned char* chunk, uint32_t column) {
                     std::memcpy(chunk, values.data() + column, kChunk);
                   });
  }
  mbarrier_complete_tx(*part.block, part.mbarrier, bytes, part.agent, part.what);
}

void issue_load(const Box& box, Block& block, uint32_t offset, uint32_t mbarrier,
                const char* what) {
  const uint32_t bytes = box.map.box_bytes();
  unsigned char* shared = shared_of(block, offset, bytes, kSharedAlignment, what);
  mbarrier_for_remote(block, mbarrier, what);
  // The issuer must know that the object has been initialised.
  race_read(shared_of(block, mbarrier, 8, 8, what), 8, what);

  race_in_flight(shared, bytes, true);
  poison(shared, bytes);
  // A swizzle permutes within a row, so rows [0, middle) and the rest are separate bytes.
  const uint32_t height = box.map.box_height, middle = height / 2;
  const auto push_part = [&](uint32_t begin, uint32_t end) {
    if (begin == end) return;
    const Part part{box, &block, offset, mbarrier, begin, end, race_fork_async(), what};
    engine_push({.what = what, .touches = &block, .perform = [part] { land(part); }});
  };
  push_part(0, middle);
  push_part(middle, height);
}

// ---- stores -------------------------------------------------------------------------------------

struct BulkStore final : Waitable {
  Box box;
  Block* block;
  uint32_t offset;
  AsyncAgent reader, writer;
  bool read = false, written = false;
  bool read_waited = false;           // by its thread
  std::vector<unsigned char> values;  // of the box's rows, between the two
  char read_object = 0, written_object = 0;

  std::string describe() const override {
    return format("TMA store from shared address 0x%x of rank %u: source %s, destination %s",
                  offset, block->rank, read ? "read" : "not read yet",
                  written ? "written" : "not written");
  }
  ~BulkStore() override {
    race_forget(&read_object);
    race_forget(&written_object);
  }
};

constexpr const char* kStore = "TMA store";

void write_destination(BulkStore& store) {
  const TensorMap& map = store.box.map;
  count_box(store.box, GlobalAccess::TmaStore);
  for (uint32_t row = 0; row < map.box_height; ++row) {
    if (!store.box.row_inside(row)) continue;
    uint8_t* destination = store.box.global_row(row);
    check_global(destination, store.box.stored_bytes(), kChunk, kStore);
    race_async_write(store.writer, destination, store.box.stored_bytes(), kStore);
    std::memcpy(destination,
                store.values.data() + row * map.box_row_bytes() +
                    store.box.first_column() * map.element_bytes,
                store.box.stored_bytes());
  }
  store.written = true;
  race_async_complete(store.writer, &store.written_object);
  race_async_complete(store.writer, &store.block->grid());  // whose end waits for it
  note_progress();
  wake_all(store);
}

void read_source(const std::shared_ptr<BulkStore>& store) {
  const TensorMap& map = store->box.map;
  unsigned char* shared = store->block->shared;
  store->values.resize(map.box_bytes());
  for (uint32_t row = 0; row < map.box_height; ++row) {
    unsigned char* values = store->values.data() + row * map.box_row_bytes();
    for_each_chunk(map, shared, store->offset, row, [&](unsigned char* chunk, uint32_t column) {
      race_async_read(store->reader, chunk, kChunk, kStore);
      std::memcpy(values + column, chunk, kChunk);
    });
  }
  store->read = true;
  race_async_complete(store->reader, &store->read_object);
  note_progress();
  wake_all(*store);
  engine_push(
      {.what = kStore, .touches = nullptr, .perform = [store] { write_destination(*store); }});
}

// The bulk groups of one thread.
struct BulkGroups final : Extension {
  using Group = std::vector<std::shared_ptr<BulkStore>>;
  Group open;
  std::deque<Group> committed;  // oldest first; until their writes were waited for

  void thread_exits(Thread&) override {
    if (!open.empty()) {
      fail(ErrorKind::ExitCheck,
           "the thread exits with %zu TMA stores in no bulk group; expected "
           "bulk_commit_group and bulk_wait_group_read<0>",
           open.size());
    }
    // The end of the grid waits for the writes, but the sources are gone when the block exits.
    for (const Group& group : committed) {
      for (const auto& store : group) {
        if (store->read_waited) continue;
        fail(ErrorKind::ExitCheck, "the thread exits without bulk_wait_group_read<0> for a %s",
             store->describe().c_str());
      }
    }
  }
};

BulkGroups& bulk_groups() {
  Thread& thread = current_thread();
  if (!thread.bulk) thread.bulk = std::make_unique<BulkGroups>();
  return static_cast<BulkGroups&>(*thread.bulk);
}

size_t groups_beyond(const BulkGroups& groups, uint32_t groups_left) {
  return groups.committed.size() > groups_left ? groups.committed.size() - groups_left : 0;
}

}  // namespace

void prefetch_tensor_map(const CUtensorMap* map) { decode_tensor_map(map, "prefetch.tensormap"); }

void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t bar, int32_t x, int32_t y) {
  constexpr const char* kWhat = "TMA load";
  Block& own = current_thread().block();
  Block& block = block_of_address(own, dst, kWhat);
  if (&block_of_address(own, bar, kWhat) != &block) {
    fail(ErrorKind::Misuse, "%s: destination 0x%x and mbarrier 0x%x lie in different blocks", kWhat,
         dst, bar);
  }
  const uint32_t offset = dst & kOffsetMask;
  const Box box = make_box(map, x, y, offset, kWhat);
  count_box(box, GlobalAccess::TmaLoad);
  issue_load(box, block, offset, bar & kOffsetMask, kWhat);
  preemption_point();
}

void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int32_t x, int32_t y,
                           uint16_t mask) {
  constexpr const char* kWhat = "TMA multicast load";
  Cluster& cluster = *current_thread().block().cluster;
  if (mask == 0 || mask >> cluster.blocks.size() != 0) {
    fail(ErrorKind::Misuse, "%s: block mask 0x%x; the cluster has %zu blocks", kWhat, mask,
         cluster.blocks.size());
  }
  const uint32_t offset = dst & kOffsetMask;
  const Box box = make_box(map, x, y, offset, kWhat);
  count_box(box, GlobalAccess::TmaLoad);
  for (const auto& block : cluster.blocks) {
    if (mask >> block->rank & 1) issue_load(box, *block, offset, bar & kOffsetMask, kWhat);
  }
  preemption_point();
}

void tma_store_2d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y) {
  auto store = std::make_shared<BulkStore>();
  store->box = make_box(map, x, y, src, kStore);
  own_shared(src, store->box.map.box_bytes(), kSharedAlignment, kStore);
  store->block = &current_thread().block();
  store->offset = src & kOffsetMask;
  store->reader = race_fork_async();
  store->writer = race_fork_async();
  bulk_groups().open.push_back(store);
  engine_push(
      {.what = kStore, .touches = store->block, .perform = [store] { read_source(store); }});
  preemption_point();
}

void bulk_commit_group() {
  BulkGroups& groups = bulk_groups();
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

void bulk_wait_group_read(uint32_t groups_left) {
  BulkGroups& groups = bulk_groups();
  for (size_t i = 0, count = groups_beyond(groups, groups_left); i < count; ++i) {
    for (const auto& store : groups.committed[i]) {
      while (!store->read) block_on(*store);
      store->read_waited = true;
      race_acquire(&store->read_object);
    }
  }
}

void bulk_wait_group(uint32_t groups_left) {
  BulkGroups& groups = bulk_groups();
  for (size_t count = groups_beyond(groups, groups_left); count > 0; --count) {
    for (const auto& store : groups.committed.front()) {
      while (!store->written) block_on(*store);
      race_acquire(&store->written_object);
    }
    groups.committed.pop_front();
  }
}

}  // namespace emulator
