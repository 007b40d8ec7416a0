// What the executor runs: entries decoded to tables of operations, on warps of blocks of clusters.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine/config.h"
#include "emulator/ptx/shadow.h"

namespace emulator::ptx {

inline constexpr uint32_t kLanes = 32, kAll = ~0u, kNone = ~0u;

// The lanes of a mask, from the first on: for (const uint32_t lane : Lanes(mask)).
struct Lanes {
  uint32_t left;
  explicit Lanes(uint32_t mask) : left(mask) {}
  Lanes begin() const { return *this; }
  Lanes end() const { return Lanes(0); }
  uint32_t operator*() const { return static_cast<uint32_t>(__builtin_ctz(left)); }
  void operator++() { left &= left - 1; }
  bool operator!=(Lanes other) const { return left != other.left; }
};

struct Warp;
struct Block;
struct Cluster;
struct Operation;

enum class Step {
  kNext,     // go on behind this operation
  kJumped,   // the operation has set where
  kBlocked,  // try it again later
  kYield,    // go on, but let others run first
};
enum Kind : uint32_t { kPlain, kExit, kWgmma };  // what is asked of an operation from outside
using Run = Step (*)(Warp&, const Operation&, uint32_t lanes);

// One instruction. Its operands are slots of the warp's file, immediates too.
struct Operation {
  Run run = nullptr;
  uint32_t d = kNone, a = kNone, b = kNone, c = kNone;
  uint32_t guard = kNone;  // a predicate's slot
  bool negated = false, branches = false, sign = false;
  bool touches_accumulators = false;  // writes a register that some wgmma accumulates in
  uint32_t target = kNone, reconverges = kNone;
  uint32_t bytes = 0;                                       // of an element in memory
  bool atomic = false, releases = false, acquires = false;  // an access to memory, at gpu scope
  uint32_t kind = kPlain;
  uint32_t mode = 0;  // what distinguishes instructions that share `run`
  int64_t offset = 0;
  std::vector<uint32_t> list;  // slots of a vector
  std::vector<uint32_t> bits;  // their registers' sizes
  int line = 0;
};

// 32 lanes of up to 64 bits, of the register's own size each; a predicate is a mask in the first 32.
struct alignas(64) Slot {
  unsigned char bytes[kLanes * 8];
};

struct Program {
  std::string file, name;
  std::vector<Operation> operations;
  std::vector<Slot> image;        // of a warp's file at the start
  std::vector<uint32_t> defined;  // which lanes of each are defined there
  std::vector<std::pair<uint32_t, std::string>> specials;
  std::vector<std::pair<uint32_t, uint32_t>> parameter_symbols;  // slot, offset
  uint32_t parameter_bytes = 0;
  std::vector<uint32_t> parameter_sizes, parameter_offsets;
  std::vector<uint64_t> runs;  // of each operation, in warps
};

struct Frame {
  uint32_t at, end, lanes;  // lanes run from `at` until they come to `end`
};

struct Copy {  // cp.async: 16 bytes of a lane
  uint32_t destination;
  const unsigned char* source;
  uint32_t bytes;  // the rest is zero
  bool landed = false;
  uint8_t lane = 0;
};
struct Products;   // wgmmas in flight
struct BulkStore;  // a copy from shared to global memory

struct Warp {
  Block* block = nullptr;
  Program* program = nullptr;
  uint32_t number = 0, agent = 0;  // in the block; in the cluster's clocks
  uint32_t lanes = 0;              // that have not exited
  std::vector<Frame> frames;
  std::unique_ptr<Slot[]> file;
  std::vector<uint32_t> undefined;  // lanes, by slot

  std::deque<std::vector<Copy>> copies;  // groups, the oldest first; the last is open
  std::deque<std::vector<std::shared_ptr<BulkStore>>> stores;  // the same
  std::shared_ptr<Products> products;
  bool accumulators_fenced = false;

  Knowledge knows, released;  // `released`: at its last fence.mbarrier_init
  // Of relaxed accesses to flags: what they publish, since its last fence.acq_rel.gpu, and what the next
  // one makes known.
  Known published, published_proxy, pending, pending_proxy;
  bool fenced = false, fenced_behind_wait = false;
  uint32_t synchronised = 0;      // its own time at which its lanes last met
  const void* waiting = nullptr;  // the barrier it has arrived at
  uint64_t phase = 0, cluster_phase = 0;
  std::string waits_for;
  uint64_t executed = 0;

  template <class T>
  T* lanes_of(uint32_t slot) {
    return reinterpret_cast<T*>(file[slot].bytes);
  }
  uint32_t& predicate(uint32_t slot) { return *lanes_of<uint32_t>(slot); }
  void define(uint32_t slot, uint32_t some) { undefined[slot] &= ~some; }
  uint32_t now() const { return knows.ordinary[agent]; }
  void tick() { ++knows.ordinary[agent]; }
  // Its lanes meet: each is ordered after all accesses of the others.
  void meet() { tick(), synchronised = now(); }
  bool waits_at(const void* object) const { return waiting == object; }
};

struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;
  uint64_t phase = 0;
  Knowledge gathered, released;
};

struct Mbarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool fenced = false;
  // Of arrivals by the own block and of copies; by others, at the scope of the cluster; and by others
  // at the scope of their block, which order only what overwrites operands of wgmma.
  Knowledge gathered, released, gathered_of_peers, of_peers;
  Clock gathered_performed, performed;
};

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0, x = 0, y = 0, z = 0;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Shadow shadow;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  uint32_t threads = 0, live_warps = 0;
  bool launched_dependents = false, waited_for_grids = false;
};

struct Grid {
  Program* program = nullptr;
  uint32_t size[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
  uint32_t shared_bytes = 0;
  std::vector<unsigned char> parameters;
  unsigned char* parameter_base = nullptr;  // aligned
  Config config;
  Rng random;
  bool race = true;
  std::vector<std::function<void()>> in_flight;  // what happens at any time from now on
  uint64_t executed = 0;
};

struct Cluster {
  Grid* grid = nullptr;
  uint32_t number = 0;  // in the sequence of grids, from 1 on
  std::vector<std::unique_ptr<Block>> blocks;
  NamedBarrier barrier;
  uint32_t agents = 0;
  std::vector<uint32_t> copies;  // how many bulk copies each block has got: their time
};

// Fails with the instruction's file and line, the block and the warp.
[[noreturn]] void fail_at(const Warp& warp, const Operation& operation, ErrorKind kind,
                          const std::string& message);
void demand_whole_warp(Warp& warp, const Operation& operation, uint32_t lanes);

// The block and offset of a shared address, of the window .shared::cluster: (rank + 1) << 24 |
// offset for a peer, the offset alone for the own block.
inline constexpr uint32_t kSharedBase = 1024, kRankShift = 24;
struct Place {
  Block* block;
  uint32_t offset;
};
Place shared_place(Warp& warp, const Operation& operation, uint32_t address, uint32_t bytes,
                   uint32_t alignment);

// A lane of a warp, as the shadow memory asks for it.
Accessor accessor(const Warp& warp, uint32_t lane);

// An exiting warp must have waited for its copies, stores and products.
void check_copies(Warp& warp, const Operation& operation);
void check_stores(Warp& warp, const Operation& operation);
void check_products(Warp& warp, const Operation& operation);
// Arrives or completes bytes; the phase ends where none is missing.
void arrive(Mbarrier& mbarrier, uint32_t arrivals, int64_t bytes);
Mbarrier& mbarrier_at(Warp& warp, const Operation& operation, Place place);

// Runs a grid to its end.
void run(Grid& grid);

}  // namespace emulator::ptx
