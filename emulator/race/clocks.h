// Vector clocks of the race checker.
//
// A launch has thousands of agents (threads, asynchronous operations), so a dense clock for each is
// too much memory traffic. Three facts keep clocks small: threads that met at a barrier know the
// same things, so they share one immutable Clock by pointer; a Clock holds one Segment for every
// block it knows anything of, and most know only their cluster; what a thread alone learnt (its own
// asynchronous operations) is a short list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace emulator::race {

using Epoch = uint32_t;

// `block` is a serial number that is never used twice in a launch sequence; threads of the block
// come first in `index`, then asynchronous slots.
struct AgentId {
  uint32_t block = 0;
  uint32_t index = 0;
  bool operator==(const AgentId&) const = default;
};

// Counts references without atomics: the layer runs all fibers on one host thread.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) { retain(); }
  Ref(const Ref& other) : object_(other.object_) { retain(); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ && --object_->references == 0) delete object_;
  }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  T* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  bool operator==(const Ref&) const = default;

  // Makes the object private to this reference before it is changed.
  T& unshared() {
    if (!object_) *this = Ref(new T());
    if (object_->references > 1) *this = Ref(new T(*object_));
    return *object_;
  }

 private:
  void retain() {
    if (object_) ++object_->references;
  }
  T* object_ = nullptr;
};

// Base of what Ref counts; a copy starts with no references.
struct Counted {
  Counted() = default;
  Counted(const Counted&) {}
  Counted& operator=(const Counted&) = delete;
  uint32_t references = 0;
};

// What is known of the agents of one block: everything up to epochs[index]; agents beyond the end
// are unknown (0).
struct Segment : Counted {
  std::vector<Epoch> epochs;
  Epoch at(uint32_t index) const { return index < epochs.size() ? epochs[index] : 0; }
};

struct Clock : Counted {
  struct Part {
    uint32_t block;
    Ref<Segment> segment;
  };
  std::vector<Part> parts;  // sorted by block

  Epoch at(AgentId agent) const {
    const auto part =
        std::lower_bound(parts.begin(), parts.end(), agent.block,
                         [](const Part& other, uint32_t wanted) { return other.block < wanted; });
    return part == parts.end() || part->block != agent.block ? 0 : part->segment->at(agent.index);
  }
  Ref<Segment>& segment(uint32_t block) {
    auto at =
        std::lower_bound(parts.begin(), parts.end(), block,
                         [](const Part& part, uint32_t wanted) { return part.block < wanted; });
    if (at == parts.end() || at->block != block) at = parts.insert(at, {block, {}});
    return at->segment;
  }
};
using ClockRef = Ref<Clock>;  // null: knows nothing

Ref<Segment> join(const Ref<Segment>& left, const Ref<Segment>& right);
// The least clock that knows what either knows; one of the two where it suffices, so that equal
// knowledge stays shared.
ClockRef join(const ClockRef& left, const ClockRef& right);
void raise(ClockRef& clock, AgentId agent, Epoch epoch);

class SyncClock;

// What one agent knows: a shared clock, its own epoch, and the few entries that it alone has learnt
// since its last barrier.
class View {
 public:
  AgentId self;
  Epoch own = 1;

  bool knows(AgentId agent, Epoch epoch) const {
    if (agent == self && epoch <= own) return true;
    if (base_ && base_->at(agent) >= epoch) return true;
    for (const Extra& extra : extras_)
      if (extra.agent == agent && extra.epoch >= epoch) return true;
    return false;
  }
  void learn(AgentId agent, Epoch epoch);
  void join(const ClockRef& other);
  void join(const View& other);
  // Takes over all that `sync` has gathered.
  void acquire(SyncClock& sync);
  const ClockRef& base() const { return base_; }
  // visit(agent, epoch) for all that is known of agents whose index in their block is first(block)
  // or more.
  template <class First, class Visit>
  void for_each(const First& first, const Visit& visit) const {
    if (base_) {
      for (const Clock::Part& part : base_->parts) {
        const auto& epochs = part.segment->epochs;
        for (uint32_t index = first(part.block); index < epochs.size(); ++index)
          if (epochs[index] > 0) visit(AgentId{part.block, index}, epochs[index]);
      }
    }
    for (const Extra& extra : extras_)
      if (extra.agent.index >= first(extra.agent.block)) visit(extra.agent, extra.epoch);
  }

 private:
  friend class SyncClock;
  struct Extra {
    AgentId agent;
    Epoch epoch;
  };
  void forget_extras_in_base();

  ClockRef base_;
  std::vector<Extra> extras_;
  uint64_t released_into_ =
      0;  // the SyncClock that already holds all of base_ and extras_, 0: none
};

// The clock of a barrier, an mbarrier phase, a flag, a group of asynchronous operations: it only
// grows.
class SyncClock {
 public:
  void release(const View& view) { gather(view); }
  void release(View& view) {
    gather(view);
    view.released_into_ = serial_;
  }
  void release(AgentId agent, Epoch epoch) { raise(clock_, agent, epoch); }
  const ClockRef& clock() const { return clock_; }

 private:
  friend class View;
  void gather(const View& view);

  ClockRef clock_;
  ClockRef included_;  // the last base that was joined: threads of one barrier bring the same
  ClockRef joined_base_,
      joined_clock_;  // the last acquire: joined_base_ with joined_clock_ gives joined_result_
  ClockRef joined_result_;
  uint64_t serial_ = next_serial();
  static uint64_t next_serial();
};

}  // namespace emulator::race
