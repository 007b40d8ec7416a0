// The agents of a launch: threads and asynchronous operations, what each of them knows, and their
// names for reports.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/machine/machine.h"
#include "emulator/race/clocks.h"
#include "emulator/race/race.h"
#include "emulator/race/shadow.h"

namespace emulator::race {

// G, and P for each Space (race.h). `performed` knows, in addition to G, accesses that are complete
// but whose writes need not be visible: it orders a later write, not a later read.
struct Knowledge {
  View seen;
  View proxied[2];
  View performed;
};

constexpr int kScopes = 3;  // Scope::Block, Cluster, Gpu

struct ThreadState {
  AgentId id;
  uint32_t cluster = 0;  // serial number
  Knowledge knowledge;
  // Relaxed atomics synchronise through fences (PTX ISA "Release and Acquire Patterns"): a store
  // publishes what was known at the last fence of a wide enough scope; what a load saw takes effect
  // at the next fence.
  std::unique_ptr<Knowledge> fenced[kScopes];
  struct Pending {
    ClockRef seen, proxied[2];
  };
  std::unique_ptr<Pending> pending[kScopes];
  std::vector<uint32_t> operations;  // its asynchronous operations, as indices into Agents

  Epoch epoch() const { return knowledge.seen.own; }
  void next_epoch() { ++knowledge.seen.own; }
};

struct OperationState {
  AgentId id;
  Epoch epoch = 0;
  Proxy proxy = Proxy::Async;
  bool complete = true;
  Knowledge issuer;  // at issue
  const Site* issued_at = nullptr;
};

class Agents {
 public:
  void begin_launch();
  ThreadState& begin_thread(Thread& thread);
  void end_thread(Thread& thread);
  ThreadState& state(const Thread& thread) { return *threads_[thread.race_id]; }

  // A new operation of `thread`, knowing what the thread knows now.
  uint32_t fork(ThreadState& thread, Proxy proxy, const Site* issued_at);
  // visit(operation, epoch) for each operation of the async proxy, issued in the thread's cluster,
  // that the thread knows to be over.
  template <class Visit>
  void for_each_finished_operation(const ThreadState& thread, const Visit& visit) const {
    const auto first = [&](uint32_t block) {
      return blocks_[block].cluster == thread.cluster ? blocks_[block].threads : kNoAgent;
    };
    thread.knowledge.seen.for_each(first, [&](AgentId agent, Epoch epoch) {
      const BlockInfo& block = blocks_[agent.block];
      if (block.slots[agent.index - block.threads].proxy == Proxy::Async) visit(agent, epoch);
    });
  }
  void peer_access(const ThreadState& thread, const Block& peer, const Site* site);
  OperationState& operation(uint32_t index) { return *operations_[index]; }
  Actor actor(uint32_t index, const char* what);

  std::string name(AgentId agent) const;

 private:
  static constexpr uint32_t kNoAgent = ~0u;
  struct BlockInfo {
    uint3 index{};
    uint32_t grid = 0, threads = 0, cluster = 0, ended = 0;
    struct Slot {  // one asynchronous operation of a thread after the other
      uint32_t issuer;
      Proxy proxy;
    };
    std::vector<Slot> slots;
    struct PeerAccess {
      AgentId agent;
      Epoch epoch;
      const Site* site;
    };
    std::vector<PeerAccess> peer_accesses;  // to its shared memory: the last of each thread
    SyncClock known_at_exit;
  };
  // Checks that every access of a peer has happened before the end of the block, when its memory is
  // released.
  void check_peer_accesses(const BlockInfo& block) const;

  std::vector<BlockInfo> blocks_;  // by serial number
  std::unordered_map<const Block*, uint32_t> running_;
  struct ClusterInfo {
    uint32_t serial = 0, blocks_ended = 0;
  };
  std::unordered_map<const Cluster*, ClusterInfo> clusters_;
  uint32_t next_cluster_ = 0;
  std::vector<std::unique_ptr<ThreadState>> threads_;  // by Thread::race_id
  std::vector<uint32_t> free_threads_;
  std::vector<std::unique_ptr<OperationState>> operations_;  // by AsyncAgent::id
};

}  // namespace emulator::race
