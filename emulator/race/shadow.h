// Shadow memory of the race checker: for every two bytes of shared memory and of registered global
// buffers, the last write and the reads since.
//
// Two bytes is the granularity because bf16 and fp16 tiles are: neighbouring elements of one 32-bit
// word may belong to different threads (the last column of an odd matrix), so four-byte cells would
// raise false alarms. Single-byte accesses carry a mask of the half they touch; when two agents
// write the two halves of one cell only the later write is remembered.
//
// A cell is two indices into a table of accesses. Neighbouring cells mostly share them, so a 16 KB
// TMA box costs one comparison a cell.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/race/clocks.h"
#include "emulator/race/race.h"

namespace emulator::race {

// Where an access was made: an instruction of the kernel, or an engine call with the frames that
// led to it.
struct Site {
  static constexpr int kFrames = 8;
  const char* what = "";
  const void* frames[kFrames] = {};
};

enum AccessFlags : uint8_t {
  kLowByte = 1,
  kHighByte = 2,
  kBothBytes = kLowByte | kHighByte,
  kAtomic = 4,        // relaxed or stronger: does not race with other atomics
  kAsynchronous = 8,  // made by an asynchronous operation, not by a thread
  kAsyncProxy = 16,   // through the async proxy: later accesses through it need no proxy fence
  kHost = 32,         // made before the launch: ordered before everything
};

struct Access {
  AgentId agent;
  Epoch epoch = 0;
  uint32_t previous = 0;              // the next older read of the same cells
  const void* instruction = nullptr;  // of the kernel; null: see site
  const Site* site = nullptr;
  uint8_t flags = 0;
};

struct Cell {
  uint32_t write = 0;  // index of the last write, 0: never written; the top bit: destination of an
                       // operation in flight
  uint32_t reads = 0;  // index of the newest read since that write, 0: none
};
constexpr uint32_t kInFlight = 1u << 31;
constexpr uint32_t kHostWrite =
    1;  // index of the one access that stands for all writes of the host
constexpr size_t kCellBytes = 2;

struct Region {
  uintptr_t begin = 0, end = 0;
  size_t guard_bytes = 0;  // on either side, never to be accessed
  Space space = Space::Global;
  std::string name;
  std::vector<Cell> cells;

  bool reaches(uintptr_t first, uintptr_t last) const {
    return first < end + guard_bytes && last >= begin - guard_bytes;
  }
};

// The agent of an access, and what is ordered before it.
struct Actor {
  AgentId id;
  Epoch epoch = 0;
  const View* seen = nullptr;       // G: what happened before
  const View* performed = nullptr;  // what, moreover, a write is ordered after
  const View* through_proxy[2] = {
      nullptr, nullptr};  // P by Space: for generic writes, if the access is in the async proxy
  uint8_t flags = 0;      // kAtomic, kAsynchronous, kAsyncProxy
  const void* instruction = nullptr;
  const Site* site = nullptr;
};

enum class Fault { Conflict, InFlight, Uninitialised, OutOfBounds };

class Shadow {
 public:
  Shadow();
  // What was written so far becomes ordered before everything; what was read is forgotten.
  void begin_launch();
  void add(const void* memory, size_t bytes, size_t guard_bytes, Space space, std::string name,
           bool initialised);
  void remove(const void* memory);
  // The region that `memory` is in, or whose guard bytes it is in.
  Region* find(const void* memory);
  void host_wrote(const void* memory, size_t bytes);

  // Checks the access against what the cells remember, then remembers it. Faults are reported
  // through report.h, which throws.
  void read(const Actor& actor, const void* memory, size_t bytes);
  void write(const Actor& actor, const void* memory, size_t bytes);
  void set_in_flight(const Actor& actor, const void* memory, size_t bytes, bool on);
  const Access& access(uint32_t index) const { return accesses_[index & ~kInFlight]; }

 private:
  struct Memo {
    uint32_t head = 0, result = 0;
    Access access;
  };
  template <class Run>
  void for_runs(const Actor& actor, bool writes, const void* memory, size_t bytes, Run run);
  bool ordered(const Access& earlier, const Actor& actor, Space space, bool earlier_wrote,
               bool writes) const;
  void check_write_before(const Region& region, const Cell& cell, const Actor& actor, uint8_t mask,
                          bool writes) const;
  void check_reads_before(const Region& region, const Cell& cell, const Actor& actor,
                          uint8_t mask) const;
  uint32_t remember(const Actor& actor, uint8_t mask, uint32_t previous, uint32_t memo_head);
  uint32_t with_reader(uint32_t reads, const Actor& actor, uint8_t mask);
  // Drops the accesses that no cell refers to any more.
  void collect();

  std::vector<std::unique_ptr<Region>> regions_;  // sorted by begin
  struct CachedPage {
    uintptr_t page = ~uintptr_t{0};
    Region* region = nullptr;
  };
  static constexpr size_t kCachedPages = 1024;
  std::vector<CachedPage> pages_;
  std::vector<Access> accesses_;
  std::vector<Memo> memo_;
  static constexpr size_t kCollectAtLeast = 1 << 20;  // 40 MB of accesses
  size_t collect_at_ = kCollectAtLeast;
};

}  // namespace emulator::race
