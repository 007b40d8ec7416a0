// The machine that executes a launch: grids of clusters of blocks of warps of threads, and what
// each of them holds.
#pragma once
#include <signal.h>
#include <vector_types.h>

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine/config.h"
#include "emulator/machine/fail.h"
#include "emulator/machine/fiber.h"
#include "emulator/race/race.h"

namespace emulator {

struct Thread;
struct Warp;
struct Block;
struct Cluster;
struct Grid;

inline constexpr uint32_t kWarpSize = 32;
inline constexpr uint32_t kWarpgroupWarps = 4;
inline constexpr uint32_t kNamedBarriers = 16;
inline constexpr uint32_t kMaxThreadsPerBlock = 1024;
inline constexpr uint32_t kMaxClusterBlocks = 8;  // portable cluster size

/// Something that threads wait for. It keeps the list of those threads and can say what it is: a
/// deadlock report asks it.
struct Waitable {
  virtual ~Waitable() = default;
  /// Name and state, for instance "mbarrier 0x400: phase 3, 1 of 2 arrivals pending, 16384 bytes
  /// outstanding".
  virtual std::string describe() const = 0;
  /// Whether a thread that polls this (poll_on) would now see something new.
  virtual bool changed() const { return false; }

  Thread* waiters = nullptr;  ///< a list through Thread::next_waiter
};

/// State that one unit of the layer attaches to a thread, a warp or a block. It is told of exits so
/// that it can check them.
struct Extension {
  virtual ~Extension() = default;
  virtual void thread_exits(Thread&) {}
  virtual void block_exits(Block&) {}
};

// ---- a thread -----------------------------------------------------------------------------------

/// A cp.async that was issued and not yet waited for.
struct PendingCopy {
  unsigned char* destination;
  const void* source;
  uint32_t bytes, source_bytes;
  AsyncAgent agent;
  bool performed;
};

struct CpAsyncState {
  std::vector<PendingCopy> copies;         ///< in issue order
  std::vector<uint32_t> committed_groups;  ///< number of copies in each, oldest first
  uint32_t uncommitted = 0;  ///< copies at the end of `copies` that are in no group yet
  uint64_t switches = 0;     ///< Machine::switches at the last copy
};

/// What a load of a flag saw. A thread that sees the same again is polling (memory.cpp).
struct FlagValue {
  const void* address = nullptr;
  uint64_t bits = 0;
};

struct Thread {
  Context context;
  FiberStack stack;
  Warp* warp = nullptr;
  uint3 index{};        ///< threadIdx
  uint32_t linear = 0;  ///< within the block
  uint32_t lane = 0;
  bool exited = false;
  bool polling = false;            ///< waits softly: poll_on
  Waitable* waiting_on = nullptr;  ///< null while it can run
  Thread* next_waiter = nullptr;
  bool fenced = false;              ///< at the scope of the device
  bool fenced_behind_wait = false;  ///< last, after its block had executed griddepcontrol.wait
  bool cluster_arrived = false;     ///< between barrier.cluster.arrive and .wait
  uint64_t cluster_generation = 0;  ///< in which it arrived
  std::array<FlagValue, 4> flags_seen{};
  uint32_t next_flag_seen = 0;
  CpAsyncState cp_async;
  std::unique_ptr<Extension> bulk;  ///< bulk groups of TMA stores
  uint32_t race_id = 0;             ///< the race checker's name for it

  Block& block() const;
};

// ---- a warp -------------------------------------------------------------------------------------

/// A warp-wide operation for which some lanes have arrived (warp.h).
struct Collective final : Waitable {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  uint64_t immediate = 0;
  const Warp* warp = nullptr;
  std::string describe() const override;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;       ///< within the block
  uint32_t lanes = 0;       ///< lanes that exist
  uint32_t alive = 0;       ///< lanes that have not exited
  uint32_t ready = 0;       ///< lanes that can run
  uint32_t rotation = 0;    ///< the lane that is preferred next
  uint32_t priority = 0;    ///< Schedule::Priority
  int32_t ready_slot = -1;  ///< position in Machine::ready_warps
  std::array<Thread*, kWarpSize> threads{};
  std::array<void*, kWarpSize> operands{};  ///< of the collectives in progress
  std::array<Collective, kWarpSize> collectives;
  uint32_t collectives_used = 0;           ///< slots above are free
  char syncwarp_object = 0;                ///< names __syncwarp for the race checker
  uint32_t registers = 0;                  ///< per thread (setmaxnreg)
  std::vector<int32_t> register_requests;  ///< every setmaxnreg so far; .dec is negative
  std::unique_ptr<Extension> wgmma;        ///< operations in flight

  uint32_t warpgroup() const { return index / kWarpgroupWarps; }
};

// ---- a block ------------------------------------------------------------------------------------

struct NamedBarrier final : Waitable {
  uint32_t index = 0;
  uint32_t expected = 0, arrived = 0;  ///< threads
  uint32_t arrived_warps = 0;          ///< as a mask
  std::string describe() const override;
};

/// The registers that setmaxnreg.dec gave back and setmaxnreg.inc may take (PTX ISA: per-CTA
/// register pool).
struct RegisterPool final : Waitable {
  uint32_t free = 0;
  const Block* block = nullptr;
  std::string describe() const override;
};

enum class BlockState { NotStarted, Running, Exited };

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  ///< in the cluster
  uint3 index{};      ///< blockIdx
  BlockState state = BlockState::NotStarted;
  unsigned char* shared = nullptr;  ///< 1024-byte aligned; address 0
  uint32_t shared_bytes = 0;
  uint32_t thread_count = 0, live_threads = 0;
  std::unique_ptr<Thread[]> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, kNamedBarriers> barriers;
  RegisterPool registers;
  uint32_t operations_in_flight = 0;    ///< asynchronous operations that touch its shared memory
  bool launched_dependents = false;     ///< griddepcontrol.launch_dependents
  bool waited_for_grid_before = false;  ///< griddepcontrol.wait
  std::unique_ptr<Extension> mbarriers;

  Grid& grid() const;
};

// ---- a cluster and a grid -----------------------------------------------------------------------

struct ClusterBarrier final : Waitable {
  uint32_t arrived = 0;
  uint64_t generation = 0;
  /// For even and odd generations: a thread may read that of its own late, when others have arrived
  /// for the next.
  std::array<char, 2> sync_objects{};
  const Cluster* cluster = nullptr;
  std::string describe() const override;
};

struct Cluster {
  Grid* grid = nullptr;
  uint32_t index = 0;
  std::vector<std::unique_ptr<Block>> blocks;  ///< by rank
  ClusterBarrier barrier;
  uint32_t live_threads = 0;
  uint32_t operations_in_flight = 0;  ///< issued by its threads or touching its memory
};

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  dim3 cluster = dim3(1, 1, 1);
  uint32_t shared_bytes = 0;
  /// As ptxas reports them; 0: the most that one block of this size can have
  /// (__launch_bounds__(threads, 1)).
  uint32_t registers_per_thread = 0;
  /// May start before the grid before it in the stream has completed (programmatic dependent
  /// launch).
  bool programmatic_dependent = false;
};

/// What griddepcontrol.wait waits for: the completion of the grid before this one.
struct GridCompletion final : Waitable {
  const Grid* grid = nullptr;
  std::string describe() const override;
};

struct Grid {
  LaunchConfig launch;
  std::function<void()> body;               ///< runs the kernel for the current thread
  uint32_t index = 0;                       ///< in the stream
  Grid* previous = nullptr;                 ///< still there until this one has completed
  std::vector<uint32_t> clusters_to_start;  ///< in random order
  uint32_t clusters_left = 0;               ///< not yet retired
  uint32_t blocks_left = 0;                 ///< not yet exited
  uint32_t blocks_to_signal = 0;            ///< neither launched their dependents nor exited
  bool complete = false;
  bool dependents_follow_its_start = false;       ///< some block published it, then signalled
  bool dependents_follow_the_one_before = false;  ///< and that it had waited for that one
  GridCompletion completion;
};

// ---- the machine --------------------------------------------------------------------------------

/// One step of an asynchronous unit, performed between two threads' turns.
struct AsyncOperation {
  const char* what = "";     ///< "TMA load", for messages
  Thread* issuer = nullptr;  ///< filled in by engine_push
  Block* touches = nullptr;  ///< whose shared memory it reads or writes: it must not exit before
  bool before_release =
      false;  ///< as an ordinary write: performed before a release that its issuer makes later
  std::function<void()>
      perform;  ///< runs on the scheduler's stack; may fail() and may engine_push()
};

struct Machine {
  Config config;  ///< a copy, taken when the launch starts
  Rng rng;
  Thread* current = nullptr;  ///< the thread that runs; null: the scheduler does
  const AsyncOperation* current_operation = nullptr;
  Context scheduler;
  std::vector<std::unique_ptr<Grid>> grids;  ///< of this launch
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Block*> blocks_to_start;  ///< resident, but not one instruction executed
  std::vector<Warp*> ready_warps;
  std::vector<Thread*> pollers;
  std::vector<AsyncOperation> operations;  ///< in issue order until one is taken at random
  uint64_t turns = 0;                      ///< of warps, so far
  uint64_t switches = 0;                   ///< times that a thread gave up control
  uint64_t progress = 0;                   ///< events that can change what a polling thread sees
  volatile sig_atomic_t time_is_over = 0;  ///< set by the watchdog
  bool residency_changed = false;          ///< a block or grid ended, or may start
  std::exception_ptr failure;              ///< thrown in a fiber, to be rethrown by the scheduler
};

namespace detail {
extern Machine the_machine;
[[noreturn]] void fail_outside_kernel();
}  // namespace detail

inline Machine& machine() { return detail::the_machine; }

/// The thread that runs; fails outside of a kernel.
inline Thread& current_thread() {
  Thread* thread = machine().current;
  if (thread == nullptr) detail::fail_outside_kernel();
  return *thread;
}

inline Block& Thread::block() const { return *warp->block; }
inline Grid& Block::grid() const { return *cluster->grid; }

}  // namespace emulator
