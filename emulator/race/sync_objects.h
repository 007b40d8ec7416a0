// What the sync objects of a launch (barriers, mbarrier phases, flags, groups of asynchronous
// operations) have gathered.
#pragma once

#include <unordered_map>
#include <vector>

#include "emulator/race/agents.h"

namespace emulator::race {

struct SyncClocks {
  SyncClock seen, proxied[2], performed;
  void release(Knowledge& knowledge);
};

class SyncObjects {
 public:
  void begin_launch() { objects_.clear(); }
  void forget(const void* sync) { objects_.erase(sync); }

  void release(ThreadState& thread, const void* sync, ReleaseMode mode);
  void release_fenced(ThreadState& thread, const void* sync, Scope scope);
  // Releases an operation that is complete, only to operations that may overwrite its operands.
  void release_finished(AgentId operation, Epoch epoch, const void* sync) {
    objects_[sync].clocks.performed.release(operation, epoch);
  }
  void acquire(ThreadState& thread, const void* sync);
  void acquire(OperationState& operation, const void* sync);
  void acquire_performed(ThreadState& thread, const void* sync);
  void complete(const OperationState& operation, const void* sync);

  // Relaxed atomics and the fences around them. A store or read-modify-write publishes what its
  // thread knew at its last fence; what a load or read-modify-write finds is known after the next
  // fence. The scopes of both fences must reach the other thread.
  void atomic(ThreadState& thread, const void* address, AtomicAccess access);
  void fence(ThreadState& thread, Scope scope);
  // A fence of at most cluster scope, for what `sync` alone has gathered.
  void fence_only(ThreadState& thread, const void* sync);

 private:
  struct Object {
    SyncClocks clocks;  // gpu scope
    struct Scoped {     // published by fences of a narrower scope, to one block or cluster
      Scope scope;
      uint32_t place;
      SyncClocks clocks;
    };
    std::vector<Scoped> scoped;
    SyncClocks* at(Scope scope, uint32_t place, bool create);
  };
  std::unordered_map<const void*, Object> objects_;
};

}  // namespace emulator::race
