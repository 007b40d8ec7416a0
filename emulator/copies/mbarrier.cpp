// mbarrier operations; see mbarrier.h.
#include "emulator/copies/mbarrier.h"

#include <cstring>

#include "emulator/machine/scheduler.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/race/race.h"

namespace emulator {
namespace {

// PTX ISA: the ranges of the expected arrival count and of the tx-count.
constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr int64_t kMaxTx = (1 << 20) - 1;
constexpr uint32_t kBytes = 8;

uint64_t stamp_of(uint32_t offset) { return 0x9E3779B97F4A7C15ull * (offset + 1); }

// The objects of one block, by offset.
struct MbarrierTable final : Extension {
  std::unordered_map<uint32_t, std::unique_ptr<Mbarrier>> live;

  void block_exits(Block&) override {
    for (const auto& [offset, mbarrier] : live) {
      if (mbarrier->phases_observed < mbarrier->phases_with_copies) {
        fail(ErrorKind::ExitCheck,
             "the block exits although no thread has waited for the copies of phase %llu of %s",
             static_cast<unsigned long long>(mbarrier->phases_with_copies - 1),
             mbarrier->describe().c_str());
      }
    }
  }

  ~MbarrierTable() override {
    for (const auto& [offset, mbarrier] : live) forget(*mbarrier);
  }

  static void forget(const Mbarrier& mbarrier) {
    for (const char& object : mbarrier.sync_objects) race_forget(&object);
    for (const char& object : mbarrier.peer_sync_objects) race_forget(&object);
    race_forget(&mbarrier.init_object);
  }
};

MbarrierTable& table_of(Block& block) {
  if (!block.mbarriers) block.mbarriers = std::make_unique<MbarrierTable>();
  return static_cast<MbarrierTable&>(*block.mbarriers);
}

Mbarrier& find(Block& block, uint32_t offset, const unsigned char* pointer, const char* what) {
  const auto& live = table_of(block).live;
  const auto found = live.find(offset);
  if (found == live.end()) {
    fail(ErrorKind::Misuse,
         "%s: shared address 0x%x of rank %u holds no mbarrier; expected mbarrier_init before it, "
         "and a barrier in between",
         what, offset, block.rank);
  }
  uint64_t stamp;
  std::memcpy(&stamp, pointer, kBytes);
  if (stamp != stamp_of(offset)) {
    fail(ErrorKind::Misuse,
         "%s: %s was overwritten by a store or a copy; its 8 bytes belong to the object", what,
         found->second->describe().c_str());
  }
  return *found->second;
}

// The object at an address of the current block, for an operation of the current thread.
Mbarrier& own_mbarrier(uint32_t bar, const char* what) {
  const unsigned char* pointer = own_shared(bar, kBytes, kBytes, what);
  Mbarrier& mbarrier = find(current_thread().block(), bar & kOffsetMask, pointer, what);
  race_read(pointer, kBytes, what);
  return mbarrier;
}

void complete_phase_if_due(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.tx != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  note_progress();
  wake_all(mbarrier);
}

void change_tx(Mbarrier& mbarrier, int64_t change, const char* what) {
  if (change == 0) return;
  mbarrier.tx += change;
  mbarrier.phases_with_copies = mbarrier.phase + 1;
  if (mbarrier.tx > kMaxTx || mbarrier.tx < -kMaxTx) {
    fail(ErrorKind::Misuse, "%s: the tx-count leaves -%lld..%lld: %s", what,
         static_cast<long long>(kMaxTx), static_cast<long long>(kMaxTx),
         mbarrier.describe().c_str());
  }
}

void count_arrival(Mbarrier& mbarrier, const char* what) {
  if (mbarrier.pending == 0) {
    fail(ErrorKind::Misuse,
         "%s: more than the %u expected arrivals in one phase, which still waits for bytes: %s",
         what, mbarrier.count, mbarrier.describe().c_str());
  }
  --mbarrier.pending;
  complete_phase_if_due(mbarrier);
}

// Whether the phase of this parity has completed: it is the one before the current one.
bool try_observe(Mbarrier& mbarrier, uint32_t parity, Scope scope) {
  if ((mbarrier.phase & 1) == parity) return false;
  if (mbarrier.phase > mbarrier.phases_observed) mbarrier.phases_observed = mbarrier.phase;
  if (mbarrier.phase == 0) return true;
  race_acquire(&mbarrier.sync_objects[parity]);
  const void* peers = &mbarrier.peer_sync_objects[parity];
  scope == Scope::Cluster ? race_acquire(peers) : race_acquire_performed(peers);
  return true;
}

void check_parity(uint32_t parity, const char* what) {
  if (parity > 1) fail(ErrorKind::Misuse, "%s: phase parity %u; expected 0 or 1", what, parity);
}

bool try_wait(uint32_t bar, uint32_t parity, Scope scope) {
  constexpr const char* kWhat = "mbarrier.try_wait";
  check_parity(parity, kWhat);
  if (try_observe(own_mbarrier(bar, kWhat), parity, scope)) return true;
  if (machine().rng.one_in(4)) {  // the time limit of the instruction has passed
    yield();
    return false;
  }
  poll_on(own_mbarrier(bar, kWhat));
  return try_observe(own_mbarrier(bar, kWhat), parity, scope);
}

void wait(uint32_t bar, uint32_t parity, Scope scope) {
  constexpr const char* kWhat = "mbarrier.try_wait";
  check_parity(parity, kWhat);
  while (!try_observe(own_mbarrier(bar, kWhat), parity, scope)) block_on(own_mbarrier(bar, kWhat));
}

}  // namespace

std::string Mbarrier::describe() const {
  return format(
      "mbarrier 0x%x of rank %u: phase %llu (parity %llu), %u of %u arrivals pending, tx-count "
      "%lld "
      "bytes",
      offset, block->rank, static_cast<unsigned long long>(phase),
      static_cast<unsigned long long>(phase & 1), pending, count, static_cast<long long>(tx));
}

void mbarrier_init(uint32_t bar, uint32_t count) {
  constexpr const char* kWhat = "mbarrier.init";
  unsigned char* pointer = own_shared(bar, kBytes, kBytes, kWhat);
  if (count == 0 || count > kMaxCount) {
    fail(ErrorKind::Misuse, "%s: count %u; expected 1..%u", kWhat, count, kMaxCount);
  }
  Block& block = current_thread().block();
  const uint32_t offset = bar & kOffsetMask;
  std::unique_ptr<Mbarrier>& slot = table_of(block).live[offset];
  if (slot) {
    fail(ErrorKind::Misuse, "%s: there is one already: %s", kWhat, slot->describe().c_str());
  }
  slot = std::make_unique<Mbarrier>();
  slot->block = &block;
  slot->offset = offset;
  slot->count = slot->pending = count;
  slot->initialiser = &current_thread();
  // An operation of its own: fence_mbarrier_init publishes it separately from the thread's other
  // writes.
  const AsyncAgent init = race_fork_async(Proxy::Generic);
  race_async_write(init, pointer, kBytes, kWhat);
  race_async_complete(init, &slot->init_object);
  race_acquire(&slot->init_object);
  const uint64_t stamp = stamp_of(offset);
  std::memcpy(pointer, &stamp, kBytes);
  preemption_point();
}

void mbarrier_arrive(uint32_t bar) {
  Mbarrier& mbarrier = own_mbarrier(bar, "mbarrier.arrive");
  race_release(mbarrier.sync_object());
  count_arrival(mbarrier, "mbarrier.arrive");
  preemption_point();
}

namespace {

// `release`: the function that releases into the sync object of the peer's phase.
void arrive_at_rank(uint32_t bar, uint32_t rank, const char* what, void (*release)(const void*)) {
  const SharedLocation at = resolve_shared(map_shared(bar, rank), kBytes, kBytes, what);
  if (at.block == &current_thread().block()) {
    Mbarrier& mbarrier = own_mbarrier(at.offset, what);
    race_release(mbarrier.sync_object());
    count_arrival(mbarrier, what);
    preemption_point();
    return;
  }
  Mbarrier& mbarrier = mbarrier_for_remote(*at.block, at.offset, what);
  race_read(at.pointer, kBytes, what);
  // Released into the current phase: the phase that expects this thread's arrival cannot complete
  // without it.
  release(mbarrier.peer_sync_object());
  race_peer_access(*at.block, what);  // which must not exit before this has arrived
  engine_push({.what = what, .touches = at.block, .before_release = true, .perform = [at, what] {
                 count_arrival(mbarrier_for_remote(*at.block, at.offset, what), what);
               }});
  preemption_point();
}

}  // namespace

void mbarrier_arrive_remote(uint32_t bar, uint32_t rank) {
  arrive_at_rank(bar, rank, "mbarrier.arrive.shared::cluster", race_release_finished);
}

void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank) {
  arrive_at_rank(bar, rank, "mbarrier.arrive.release.cluster.shared::cluster",
                 [](const void* sync) { race_release(sync); });
}

void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  constexpr const char* kWhat = "mbarrier.arrive.expect_tx";
  Mbarrier& mbarrier = own_mbarrier(bar, kWhat);
  change_tx(mbarrier, bytes, kWhat);
  race_release(mbarrier.sync_object());
  count_arrival(mbarrier, kWhat);
  preemption_point();
}

void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  constexpr const char* kWhat = "mbarrier.expect_tx";
  Mbarrier& mbarrier = own_mbarrier(bar, kWhat);
  change_tx(mbarrier, bytes, kWhat);
  complete_phase_if_due(mbarrier);
  preemption_point();
}

bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  return try_wait(bar, parity, Scope::Block);
}
void mbarrier_wait(uint32_t bar, uint32_t parity) { wait(bar, parity, Scope::Block); }
bool mbarrier_try_wait_cluster(uint32_t bar, uint32_t parity) {
  return try_wait(bar, parity, Scope::Cluster);
}
void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) { wait(bar, parity, Scope::Cluster); }

void fence_mbarrier_init() {
  Thread& thread = current_thread();
  for (const auto& [offset, mbarrier] : table_of(thread.block()).live) {
    if (mbarrier->initialiser != &thread) continue;
    mbarrier->fenced = true;
    race_fence_only(&mbarrier->init_object);
  }
}

Mbarrier& mbarrier_for_remote(Block& block, uint32_t offset, const char* what) {
  const unsigned char* pointer = shared_of(block, offset, kBytes, kBytes, what);
  Mbarrier& mbarrier = find(block, offset, pointer, what);
  if (!mbarrier.fenced) {
    fail(ErrorKind::Misuse,
         "%s: the thread that initialised it has not executed fence_mbarrier_init: %s", what,
         mbarrier.describe().c_str());
  }
  return mbarrier;
}

void mbarrier_complete_tx(Block& block, uint32_t offset, uint32_t bytes, AsyncAgent agent,
                          const char* what) {
  Mbarrier& mbarrier = mbarrier_for_remote(block, offset, what);
  race_async_complete(agent, mbarrier.sync_object());
  change_tx(mbarrier, -static_cast<int64_t>(bytes), what);
  complete_phase_if_due(mbarrier);
}

}  // namespace emulator
