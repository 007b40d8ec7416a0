// mbarrier objects (PTX ISA, "mbarrier"): barriers in shared memory that count arrivals and the
// bytes of asynchronous copies.
//
// The 8 bytes of an object hold a stamp; its state is outside of the memory: an ordinary store or a
// copy over the object is detected by the next operation on it. `bar` is an address of the calling
// block's own shared memory.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulator/machine/machine.h"

namespace emulator {

void mbarrier_init(uint32_t bar, uint32_t count);
void mbarrier_arrive(uint32_t bar);
/// Both arrive at the object at the same offset in block `rank` of the cluster. The arrival is in
/// flight for a while: that block must not exit before it has landed. _remote is the default form,
/// .release at .cta scope: to another block it orders no access of threads, but a waiter there
/// may have operations of the async proxy overwrite what such operations have read, if the caller
/// had waited for them. _cluster releases at .cluster scope.
void mbarrier_arrive_remote(uint32_t bar, uint32_t rank);
void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank);
void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes);
void mbarrier_expect_tx(uint32_t bar, uint32_t bytes);
/// mbarrier.try_wait.parity: may wait for a while and may return false at any time before the phase
/// of this parity has completed.
bool mbarrier_try_wait(uint32_t bar, uint32_t parity);
/// Loops on try_wait.
void mbarrier_wait(uint32_t bar, uint32_t parity);
/// Acquires at cluster scope. The two above acquire in the block: what threads of other
/// blocks read is over, but what they wrote need not be visible; bulk copies are, to each.
bool mbarrier_try_wait_cluster(uint32_t bar, uint32_t parity);
void mbarrier_wait_cluster(uint32_t bar, uint32_t parity);
/// Needed, after init and by the thread that did it, before TMA or a peer uses the object. The
/// PTX ISA asks for some ordering towards the async proxy; that it be this fence is our rule.
void fence_mbarrier_init();

// ---- for the asynchronous units -----------------------------------------------------------------

struct Mbarrier final : Waitable {
  Block* block = nullptr;
  uint32_t offset = 0;
  uint32_t count = 0;    ///< arrivals of each phase
  uint32_t pending = 0;  ///< arrivals that the current phase still needs
  int64_t tx = 0;        ///< bytes expected less bytes completed
  uint64_t phase = 0;    ///< phases completed so far; its parity is the current phase's
  Thread* initialiser = nullptr;
  bool fenced = false;  ///< fence_mbarrier_init by the initialiser
  uint64_t phases_with_copies =
      0;                         ///< 1 + the last phase in which bytes were expected or completed
  uint64_t phases_observed = 0;  ///< phases whose completion some thread has waited for
  std::array<char, 2> sync_objects{};       ///< of even and odd phases
  std::array<char, 2> peer_sync_objects{};  ///< released by arrivals from other blocks
  char init_object = 0;                     ///< released by init, as an operation of its own

  std::string describe() const override;
  const void* sync_object() const { return &sync_objects[phase & 1]; }
  const void* peer_sync_object() const { return &peer_sync_objects[phase & 1]; }
};

/// The live object at `offset` of `block`, for an operation that comes through the async proxy or
/// from a peer. Called at issue by the current thread, and again when the operation takes effect.
Mbarrier& mbarrier_for_remote(Block& block, uint32_t offset, const char* what);
/// The completion of `bytes` of a copy by `agent`.
void mbarrier_complete_tx(Block& block, uint32_t offset, uint32_t bytes, AsyncAgent agent,
                          const char* what);

}  // namespace emulator
