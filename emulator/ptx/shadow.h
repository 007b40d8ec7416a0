// What is known of each byte of a block's shared memory: whether it is defined, whether a copy is on
// its way to it, and who wrote and read it last, by vector clocks of the cluster's warps.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine/fail.h"

namespace emulator::ptx {

// The time of each warp of a cluster, and of each block's asynchronous copies.
using Clock = std::vector<uint32_t>;
inline void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i)
    if (to[i] < from[i]) to[i] = from[i];
}

// What is known of other clusters' accesses to global memory, by the cluster's number, and of grids of
// the sequence that are complete, a bit each. Shared: few learn anything.
using Far = std::map<uint32_t, Clock>;
struct Known {
  std::shared_ptr<const Far> clusters;
  uint64_t grids = 0;
  void learn(const Known& other);
};

// What has happened before: for ordinary accesses, and for those by the async proxy.
struct Knowledge {
  Clock ordinary, proxy;
  Clock performed;  // whose finished accesses by the async proxy a write is ordered after, too
  Known global, global_proxy;
  void learn(const Knowledge& other) {
    join(ordinary, other.ordinary), join(proxy, other.proxy);
    join(performed, other.performed);
    global.learn(other.global), global_proxy.learn(other.global_proxy);
  }
};

struct Accessor {
  uint32_t agent, lane;
  const Clock* clock;     // what it knows of ordinary writes
  const Clock* others;    // and of reads, and of writes by the async proxy
  uint32_t time;          // its own
  uint32_t synchronised;  // when its warp's lanes last met
  bool proxy = false;     // it is an access by the async proxy
  const Clock* performed = nullptr;
};

class Shadow {
 public:
  void begin(uint32_t bytes, uint32_t agents, uint32_t warps, bool race);

  bool defined(uint32_t at, uint32_t bytes) const {
    for (uint32_t i = 0; i < bytes; ++i)
      if (state_[at + i] != kDefined) return false;
    return true;
  }
  void set_defined(uint32_t at, uint32_t bytes, bool is) {
    for (uint32_t i = 0; i < bytes; ++i) state_[at + i] = is ? kDefined : kUndefined;
  }
  // From now on until it has been waited for, nobody may touch the bytes.
  void set_in_flight(uint32_t at, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; ++i) state_[at + i] = kInFlight;
  }
  bool in_flight(uint32_t at, uint32_t bytes) const {
    for (uint32_t i = 0; i < bytes; ++i)
      if (state_[at + i] == kInFlight) return true;
    return false;
  }

  // "" or why nothing orders the access after those before it.
  std::string read(uint32_t at, uint32_t bytes, const Accessor& by);
  std::string write(uint32_t at, uint32_t bytes, const Accessor& by);

 private:
  enum State : unsigned char { kUndefined, kDefined, kInFlight };
  static constexpr uint32_t kCell = 2;  // bytes that are judged together
  struct Cell {
    uint32_t time = 0;
    uint16_t agent = 0, lane = 0;
  };
  std::string unordered(const char* what, const char* before, uint32_t at, uint32_t agent) const;

  std::vector<unsigned char> state_;
  std::vector<Cell> writers_;
  std::vector<uint32_t> reads_;  // [cell][agent]: twice its time, and whether by the async proxy
  uint32_t agents_ = 0, warps_ = 0;
  bool race_ = false;
};

}  // namespace emulator::ptx
