// Runs a grid: clusters become resident as there is room, and a schedule says which warp runs.
#include <algorithm>
#include <ctime>

#include "emulator/machine/fail.h"
#include "emulator/ptx/global.h"
#include "emulator/ptx/loops.h"

namespace emulator::ptx {

void fail_at(const Warp& warp, const Operation& o, ErrorKind kind, const std::string& message) {
  const Block& block = *warp.block;
  throw Error(kind,
              format("%s\n%s:%d, block (%u, %u, %u) warp %u", message.c_str(),
                     warp.program->file.c_str(), o.line, block.x, block.y, block.z, warp.number));
}

void demand_whole_warp(Warp& warp, const Operation& o, uint32_t lanes) {
  if (lanes != warp.lanes)
    fail_at(warp, o, ErrorKind::Misuse,
            format("an instruction of the whole warp is executed by lanes 0x%x of 0x%x", lanes,
                   warp.lanes));
}

namespace {

constexpr uint32_t kSpinsUntilLanding = 256;
constexpr size_t kMostBytes = size_t{512} << 20;  // of the resident warps' registers

uint32_t special(const Grid& grid, const Warp& warp, const std::string& name, uint32_t lane) {
  const Block& block = *warp.block;
  const uint32_t thread = warp.number * kLanes + lane;
  const uint32_t *size = grid.block, axis = static_cast<uint32_t>(name.back() - 'x');
  if (name == "%laneid") return lane;
  if (name == "%warpid") return warp.number;
  if (name == "%cluster_ctarank") return block.rank;
  if (name == "%cluster_nctarank") return static_cast<uint32_t>(block.cluster->blocks.size());
  if (name.starts_with("%tid."))
    return axis == 0   ? thread % size[0]
           : axis == 1 ? thread / size[0] % size[1]
                       : thread / size[0] / size[1];
  if (name.starts_with("%ntid.")) return size[axis];
  const uint32_t at[] = {block.x, block.y, block.z};
  if (name.starts_with("%ctaid.")) return at[axis];
  if (name.starts_with("%clusterid.")) return at[axis] / grid.cluster[axis];
  return grid.size[axis];  // %nctaid
}

void start_warp(Grid& grid, Warp& warp) {
  Program& program = *warp.program;
  const size_t slots = program.image.size();
  warp.file = std::make_unique_for_overwrite<Slot[]>(slots);
  std::memcpy(static_cast<void*>(warp.file.get()), program.image.data(), slots * sizeof(Slot));
  warp.undefined.resize(slots);
  for (size_t i = 0; i < slots; ++i) warp.undefined[i] = ~program.defined[i];
  for (const auto& [slot, name] : program.specials)
    for (uint32_t lane = 0; lane < kLanes; ++lane)
      warp.lanes_of<uint32_t>(slot)[lane] = special(grid, warp, name, lane);
  for (const auto& [slot, offset] : program.parameter_symbols)
    for (uint32_t lane = 0; lane < kLanes; ++lane)
      warp.lanes_of<uint64_t>(slot)[lane] =
          reinterpret_cast<uint64_t>(grid.parameter_base) + offset;
  warp.frames.push_back({0, kNone, warp.lanes});
}

std::unique_ptr<Cluster> make_cluster(Grid& grid, uint32_t number) {
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid, cluster->number = global_memory().next_cluster();
  const uint32_t threads = grid.block[0] * grid.block[1] * grid.block[2];
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const uint32_t* c = grid.cluster;
  const uint32_t blocks = c[0] * c[1] * c[2];
  const uint32_t across = grid.size[0] / c[0], down = grid.size[1] / c[1];
  cluster->agents = blocks * warps + blocks;
  cluster->copies.assign(blocks, 0);
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    auto& block = *cluster->blocks.emplace_back(std::make_unique<Block>());
    block.cluster = cluster.get(), block.rank = rank;
    block.x = number % across * c[0] + rank % c[0];
    block.y = number / across % down * c[1] + rank / c[0] % c[1];
    block.z = number / across / down * c[2] + rank / c[0] / c[1];
    block.threads = threads, block.live_warps = warps;
    block.shared.assign(grid.shared_bytes, kPoisonByte);
    block.shadow.begin(grid.shared_bytes, cluster->agents, blocks * warps, grid.race);
    block.warps.resize(warps);
    for (uint32_t i = 0; i < warps; ++i) {
      Warp& warp = block.warps[i];
      warp.block = &block, warp.program = grid.program, warp.number = i;
      warp.agent = rank * warps + i;
      const uint32_t left = threads - i * kLanes;
      warp.lanes = left >= kLanes ? kAll : (1u << left) - 1;
      warp.knows.ordinary.assign(cluster->agents, 0), warp.knows.proxy = warp.knows.ordinary;
      global_memory().start(warp);
      warp.tick();
    }
  }
  for (auto& block : cluster->blocks)
    for (Warp& warp : block->warps) start_warp(grid, warp);
  return cluster;
}

void leave(Warp& warp, const Operation& o, uint32_t lanes) {
  warp.lanes &= ~lanes;
  for (Frame& frame : warp.frames) frame.lanes &= ~lanes;
  if (warp.lanes != 0) return;
  check_copies(warp, o), check_stores(warp, o), check_products(warp, o);
  if (warp.cluster_phase != 0)
    fail_at(warp, o, ErrorKind::ExitCheck, "exits without waiting at the cluster's barrier");
  global_memory().leave(warp);
  Block& block = *warp.block;
  if (--block.live_warps != 0) return;
  global_memory().block_exits(block);
  for (const auto& [offset, mbarrier] : block.mbarriers)
    if (mbarrier.bytes != 0)
      fail_at(warp, o, ErrorKind::ExitCheck,
              format("the block exits while copies are on their way to mbarrier %u", offset));
}

void branch(Warp& warp, const Operation& o, uint32_t taken) {
  Frame& frame = warp.frames.back();
  const uint32_t others = frame.lanes & ~taken;
  if (others == 0) {
    frame.at = o.target;
  } else if (taken == 0) {
    ++frame.at;
  } else {
    const Frame straight{frame.at + 1, o.reconverges, others};
    const Frame jumps{o.target, o.reconverges, taken};
    frame.at = o.reconverges;
    warp.frames.push_back(straight);
    warp.frames.push_back(jumps);
  }
}

enum class Ended { kBlocked, kYielded, kExited };

// Runs a warp until it has to wait, lets others run, or has executed `budget` instructions.
Ended run_warp(Warp& warp, uint64_t budget, uint64_t& executed) {
  Program& program = *warp.program;
  const Operation* operations = program.operations.data();
  while (warp.lanes != 0) {
    if (warp.frames.back().at == warp.frames.back().end || warp.frames.back().lanes == 0) {
      warp.frames.pop_back();
      continue;
    }
    Frame& frame = warp.frames.back();
    const Operation& o = operations[frame.at];
    uint32_t lanes = frame.lanes;
    if (o.guard != kNone) {
      if (warp.undefined[o.guard] & lanes)
        fail_at(warp, o, ErrorKind::Uninitialised, "an undefined predicate");
      lanes &= o.negated ? ~warp.predicate(o.guard) : warp.predicate(o.guard);
    }
    ++program.runs[frame.at], ++executed;
    if (o.branches) {
      branch(warp, o, lanes);
    } else if (lanes == 0) {
      ++frame.at;
    } else if (o.kind == kExit) {
      ++frame.at;
      leave(warp, o, lanes);
      continue;
    } else {
      if (o.touches_accumulators) warp.accumulators_fenced = false;
      const Step step = o.run(warp, o, lanes);
      if (step == Step::kBlocked) return Ended::kBlocked;
      ++frame.at;
      if (step == Step::kYield) return Ended::kYielded;
    }
    if (--budget == 0) return Ended::kYielded;
  }
  return Ended::kExited;
}

class Machine {
 public:
  explicit Machine(Grid& grid) : grid_(grid) {
    clusters_ = grid.size[0] * grid.size[1] * grid.size[2] /
                (grid.cluster[0] * grid.cluster[1] * grid.cluster[2]);
    most_ = grid.config.resident_clusters == 0 ? clusters_ : grid.config.resident_clusters;
    const size_t warps = (size_t{grid.block[0]} * grid.block[1] * grid.block[2] + 31) / 32 *
                         grid.cluster[0] * grid.cluster[1] * grid.cluster[2];
    const size_t bytes = warps * (grid.program->image.size() + 1) * sizeof(Slot);
    most_ = std::clamp<uint32_t>(static_cast<uint32_t>(kMostBytes / bytes), 1, most_);
  }

  void run() {
    const clock_t start = clock();
    fill();
    for (uint64_t turns = 0; !ready_.empty() || started_ < clusters_; ++turns) {
      Warp* warp = next();
      if (warp == nullptr) {
        if (!land_one()) deadlock();
        continue;
      }
      const uint64_t before = grid_.executed;
      const Ended ended = run_warp(*warp, budget(), grid_.executed);
      if (grid_.executed > before + 1 || ended != Ended::kBlocked) blocked_.clear();
      if (ended == Ended::kBlocked) blocked_.push_back(warp);
      if (ended == Ended::kExited) retire(warp);
      if (ended == Ended::kYielded && ++spins_ % kSpinsUntilLanding == 0) land_one();
      if (grid_.config.completion == Completion::Random && grid_.random.one_in(4)) land_one();
      if (turns % 1024 == 0 &&
          static_cast<double>(clock() - start) > grid_.config.watchdog_seconds * CLOCKS_PER_SEC)
        throw Error(ErrorKind::Watchdog, "the launch of " + grid_.program->name +
                                             " took longer than the watchdog allows");
    }
    while (land_one()) {
    }
  }

 private:
  uint64_t budget() {
    return grid_.config.schedule == Schedule::Random ? 1 + grid_.random.below(64) : ~uint64_t{0};
  }

  void fill() {
    while (started_ < clusters_ && resident_.size() < most_) {
      resident_.push_back(make_cluster(grid_, started_++));
      for (auto& block : resident_.back()->blocks)
        for (Warp& warp : block->warps) ready_.push_back(&warp);
      if (grid_.config.schedule == Schedule::Priority) {
        for (size_t i = ready_.size(); i > 1; --i)
          std::swap(ready_[i - 1], ready_[grid_.random.below(static_cast<uint32_t>(i))]);
      }
    }
  }

  // Of the warps that have not found themselves blocked since something happened: RunAhead takes
  // the last that ran, Priority the first of an order, Random any.
  Warp* next() {
    std::vector<Warp*>& free = free_;
    free.clear();
    for (Warp* warp : ready_)
      if (std::find(blocked_.begin(), blocked_.end(), warp) == blocked_.end()) free.push_back(warp);
    if (free.empty()) return nullptr;
    if (grid_.config.schedule == Schedule::Priority) {
      if (grid_.random.one_in(64))
        std::swap(ready_[0], ready_[grid_.random.below(static_cast<uint32_t>(ready_.size()))]);
      return spins_ % 16 == 15 ? pick(free) : free.front();
    }
    if (grid_.config.schedule == Schedule::RunAhead && spins_ % 16 != 15 &&
        std::find(free.begin(), free.end(), last_) != free.end())
      return last_;
    return last_ = pick(free);
  }
  Warp* pick(const std::vector<Warp*>& free) {
    return free[grid_.random.below(static_cast<uint32_t>(free.size()))];
  }

  void retire(Warp* warp) {
    std::erase(ready_, warp);
    warp->file.reset();
    Cluster* cluster = warp->block->cluster;
    for (const auto& block : cluster->blocks)
      if (block->live_warps != 0) return;
    std::erase_if(resident_, [&](const auto& each) { return each.get() == cluster; });
    fill();
  }

  // Something asynchronous happens; false if nothing is in flight.
  bool land_one() {
    auto& all = grid_.in_flight;
    if (all.empty()) return false;
    const size_t which = grid_.random.below(static_cast<uint32_t>(all.size()));
    std::swap(all[which], all.back());
    const auto happen = std::move(all.back());
    all.pop_back();
    happen();
    blocked_.clear();
    return true;
  }

  [[noreturn]] void deadlock() const {
    std::string text = "no warp of " + grid_.program->name + " can go on:";
    for (const Warp* warp : ready_) {
      const Operation& o = warp->program->operations[warp->frames.back().at];
      text += format("\nblock (%u, %u, %u) warp %u, line %d: %s", warp->block->x, warp->block->y,
                     warp->block->z, warp->number, o.line, warp->waits_for.c_str());
    }
    throw Error(ErrorKind::Deadlock, text);
  }

  Grid& grid_;
  uint32_t clusters_, most_, started_ = 0;
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Warp*> ready_, blocked_, free_;
  Warp* last_ = nullptr;
  uint64_t spins_ = 0;
};

}  // namespace

void run(Grid& grid) { Machine(grid).run(); }

}  // namespace emulator::ptx
