// Races in global memory: who wrote and read each two bytes of it, what flags carry from block to
// block, and which grids a warp knows to be complete.
//
// Warps of different clusters are ordered by releases and acquires at the scope of the GPU alone (PTX
// ISA, "Release and Acquire Patterns"): ld.acquire and red.release of a flag, or relaxed accesses
// behind and before fence.acq_rel. A grid of an ordinary launch is ordered after the grid before and
// all that this has waited for, in every proxy ("API synchronization"); a programmatic dependent after what griddepcontrol.wait has
// waited for, and what the grid before had fenced when it called launch_dependents (the rules of
// emulator/threads/grid_dependency.h). What precedes by a wait or a flag precedes a tensor copy only
// behind fence.proxy.async ("Proxies").
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>

#include "emulator/ptx/machine.h"

namespace emulator::ptx {

class GlobalMemory {
 public:
  // Everything so far is known to everyone: the host has waited for it.
  void forget();
  void begin_grid(bool programmatic);
  void written_before(const void* buffer);  // by a grid before the sequence
  // What comes behind the sequence by an ordinary launch may free or overwrite all that its grids use.
  void end_of_sequence();
  void start(Warp& warp);
  void leave(Warp& warp);  // it exits
  void block_exits(Block& block);

  enum Access : uint8_t { kPlain = 0, kAtomic = 1, kAsync = 2 };
  // "" or why nothing orders the access after those before it. `complete`: of a store by the async
  // proxy, whether it has been waited for.
  std::string read(const Warp& warp, uint32_t lane, const void* pointer, uint32_t bytes,
                   Access access);
  std::string write(const Warp& warp, uint32_t lane, const void* pointer, uint32_t bytes,
                    Access access, bool complete = true);

  void fence(Warp& warp);        // fence.acq_rel.gpu
  void proxy_fence(Warp& warp);  // fence.proxy.async.global
  // An atomic access to a flag: what it publishes, at once or of its last fence, and what it learns, at
  // once or at its next.
  void release(Warp& warp, const void* flag, bool at_once);
  void acquire(Warp& warp, const void* flag, bool at_once);

  void wait_for_grids(Warp& warp);  // griddepcontrol.wait
  void launch_dependents(Warp& warp);

 private:
  struct Who {
    uint32_t cluster = 0, time = 0;  // of no cluster: nobody
    uint16_t agent = 0;
    uint8_t lane = 0, grid : 6 = 0, access : 2 = 0;
    uint8_t halves = 0;  // of the two bytes
  };
  struct Cell {
    Who writer, readers[2];
  };
  static constexpr uint64_t kPage = 4096, kCell = 2;
  struct Page {
    uint64_t era = 0;
    Cell cells[kPage / kCell];
  };
  struct Sequenced {  // a grid
    uint64_t started = 0, started_proxy = 0,
             ended = 0;  // grids complete for its first and last warps
    bool follow_start = false, follow_before = false;  // what a dependent of it starts behind
  };
  Page& page(uint64_t number);
  Cell& cell(uint64_t at) { return page(at / kPage).cells[at % kPage / kCell]; }
  bool known(const Warp& warp, uint32_t lane, const Who& who, bool through_proxy) const;
  std::string unordered(const char* what, const char* before, const void* pointer,
                        const Who& who) const;
  void signal(Block& block, bool start, bool before);
  Who who(const Warp& warp, uint32_t lane, Access access) const;

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  uint64_t last_number_ = ~uint64_t{0}, era_ = 1;
  Page* last_ = nullptr;
  std::unordered_map<const void*, Known> flags_, flags_proxy_;
  std::vector<Sequenced> grids_;
  uint32_t clusters_ = 0;

 public:
  uint32_t next_cluster() { return ++clusters_; }
};

GlobalMemory& global_memory();

}  // namespace emulator::ptx
