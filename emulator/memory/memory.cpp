// Flags, atomics and fences; threads that poll are parked until what they look at changes.
#include "emulator/memory/memory.h"

#include "emulator/counts/counters.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/threads/grid_dependency.h"

namespace emulator {
namespace {

uint64_t bits_at(const void* address, uint32_t bytes) {
  uint64_t bits = 0;
  std::memcpy(&bits, address, bytes);
  return bits;
}

struct FlagPoll final : Waitable {
  FlagPoll(const void* address, uint32_t bytes, const char* what)
      : address(address), bytes(bytes), what(what), seen(bits_at(address, bytes)) {}
  bool changed() const override { return bits_at(address, bytes) != seen; }
  std::string describe() const override {
    const GlobalRange* range = find_global(address);
    std::string text = std::string(what) + " of ";
    if (range != nullptr) {
      text += range->name +
              format(" + %td bytes", static_cast<const unsigned char*>(address) - range->begin);
    } else {
      text += format("%p", address);
    }
    return text + format(", which holds %llu", static_cast<unsigned long long>(seen));
  }
  const void* address;
  uint32_t bytes;
  const char* what;
  uint64_t seen;
};

// A thread that sees a value that it has seen there lately polls: it is not scheduled until the
// value changes, or until nothing else can run.
void wait_if_polling(const void* address, uint32_t bytes, const char* what) {
  Thread& self = current_thread();
  for (const FlagValue& seen : self.flags_seen) {
    if (seen.address != address || seen.bits != bits_at(address, bytes)) continue;
    FlagPoll poll(address, bytes, what);
    return poll_on(poll);
  }
  preemption_point();
}

void remember(const void* address, uint32_t bytes) {
  Thread& self = current_thread();
  for (FlagValue& seen : self.flags_seen) {
    if (seen.address == address) {
      seen.bits = bits_at(address, bytes);
      return;
    }
  }
  self.flags_seen[self.next_flag_seen++ % self.flags_seen.size()] = {address,
                                                                     bits_at(address, bytes)};
}

template <class Address>
void check_flag(Address* address, const char* what) {
  check_global(address, sizeof(*address), sizeof(*address), what);
}

// Atomics work on generic pointers; only global memory has traffic to count.
void count_if_global(GlobalAccess kind, const void* address, uint32_t bytes) {
  const Block& block = current_thread().block();
  const auto offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(block.shared_bytes)) {
    count_global(kind, bytes);
  }
}

}  // namespace

uint32_t load_acquire_gpu(const uint32_t* address) {
  constexpr const char* kName = "ld.acquire.gpu";
  check_flag(address, kName);
  wait_if_polling(address, sizeof(*address), kName);
  remember(address, sizeof(*address));
  race_atomic(address, sizeof(*address), AtomicAccess::Load, kName);
  race_acquire(address);
  count_if_global(GlobalAccess::Load, address, sizeof(*address));
  const uint32_t value = *address;
  preemption_point();  // others may change it before the caller acts on it
  return value;
}

void store_release_gpu(uint32_t* address, uint32_t value) {
  constexpr const char* kName = "st.release.gpu";
  check_flag(address, kName);
  race_atomic(address, sizeof(*address), AtomicAccess::Store, kName);
  perform_before_release(current_thread());
  race_release(address, ReleaseMode::Replace);
  count_if_global(GlobalAccess::Store, address, sizeof(*address));
  *address = value;
  note_progress();
  preemption_point();
}

void atomic_add_release_gpu(uint32_t* address, uint32_t value) {
  constexpr const char* kName = "red.release.gpu.add";
  check_flag(address, kName);
  race_atomic(address, sizeof(*address), AtomicAccess::ReadModifyWrite, kName);
  perform_before_release(current_thread());
  race_release(address, ReleaseMode::Join);
  count_if_global(GlobalAccess::Atomic, address, sizeof(*address));
  *address += value;
  note_progress();
  preemption_point();
}

uint32_t atomic_add_relaxed_gpu(uint32_t* address, uint32_t value) {
  return atomic_update(address, "atom.relaxed.gpu.add", [=](uint32_t old) { return old + value; });
}

void atomic_begin(const void* address, uint32_t bytes, const char* what) {
  check_global(address, bytes, bytes, what);
  race_atomic(address, bytes, AtomicAccess::ReadModifyWrite, what);
  count_if_global(GlobalAccess::Atomic, address, bytes);
}

void atomic_end(const void* address, uint32_t bytes, bool changed, const char* what) {
  if (changed) {
    note_progress();
    preemption_point();
  } else {
    wait_if_polling(address, bytes, what);
    remember(address, bytes);
  }
}

void fence_acq_rel_gpu() {
  perform_before_release(current_thread());
  race_fence(Scope::Gpu);
  grid_dependency_fence(current_thread());
}
void fence_acq_rel_cluster() {
  perform_before_release(current_thread());
  race_fence(Scope::Cluster);
}
void fence_acq_rel_block() { race_fence(Scope::Block); }

void fence_proxy_async_shared() { race_proxy_fence(Space::Shared); }
void fence_proxy_async_global() { race_proxy_fence(Space::Global); }

uint32_t load_shared_cluster_u32(uint32_t address) {
  constexpr const char* kName = "ld.shared::cluster";
  const SharedLocation location = resolve_shared(address, 4, 4, kName);
  race_read(location.pointer, 4, kName);
  race_peer_access(*location.block, kName);
  return static_cast<uint32_t>(bits_at(location.pointer, 4));
}

void store_shared_cluster_u32(uint32_t address, uint32_t value) {
  constexpr const char* kName = "st.shared::cluster";
  const SharedLocation location = resolve_shared(address, 4, 4, kName);
  race_write(location.pointer, 4, kName);
  race_peer_access(*location.block, kName);
  std::memcpy(location.pointer, &value, 4);
  preemption_point();
}

}  // namespace emulator
