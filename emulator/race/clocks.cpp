// Joins of vector clocks; see clocks.h for the representation.
#include "emulator/race/clocks.h"

namespace emulator::race {

Ref<Segment> join(const Ref<Segment>& left, const Ref<Segment>& right) {
  if (left == right || !right) return left;
  if (!left) return right;
  const std::vector<Epoch>& a = left->epochs;
  const std::vector<Epoch>& b = right->epochs;
  bool left_suffices = a.size() >= b.size();
  bool right_suffices = b.size() >= a.size();
  for (size_t i = 0, n = std::min(a.size(), b.size()); i < n; ++i) {
    left_suffices &= a[i] >= b[i];
    right_suffices &= b[i] >= a[i];
  }
  if (left_suffices) return left;
  if (right_suffices) return right;
  Ref<Segment> joined(new Segment());
  joined->epochs.resize(std::max(a.size(), b.size()), 0);
  std::copy(a.begin(), a.end(), joined->epochs.begin());
  for (size_t i = 0; i < b.size(); ++i) joined->epochs[i] = std::max(joined->epochs[i], b[i]);
  return joined;
}

ClockRef join(const ClockRef& left, const ClockRef& right) {
  if (left == right || !right) return left;
  if (!left) return right;
  ClockRef joined(new Clock());
  joined->parts.reserve(left->parts.size() + right->parts.size());
  bool left_suffices = true, right_suffices = true;
  auto a = left->parts.begin(), b = right->parts.begin();
  while (a != left->parts.end() || b != right->parts.end()) {
    if (b == right->parts.end() || (a != left->parts.end() && a->block < b->block)) {
      right_suffices = false;
      joined->parts.push_back(*a++);
    } else if (a == left->parts.end() || b->block < a->block) {
      left_suffices = false;
      joined->parts.push_back(*b++);
    } else {
      joined->parts.push_back({a->block, join(a->segment, b->segment)});
      left_suffices &= joined->parts.back().segment == a->segment;
      right_suffices &= joined->parts.back().segment == b->segment;
      ++a, ++b;
    }
  }
  return left_suffices ? left : right_suffices ? right : joined;
}

void raise(ClockRef& clock, AgentId agent, Epoch epoch) {
  if (clock && clock->at(agent) >= epoch) return;
  std::vector<Epoch>& epochs = clock.unshared().segment(agent.block).unshared().epochs;
  if (epochs.size() <= agent.index) epochs.resize(agent.index + 1, 0);
  epochs[agent.index] = epoch;
}

void View::learn(AgentId agent, Epoch epoch) {
  if (knows(agent, epoch)) return;
  released_into_ = 0;
  for (Extra& extra : extras_)
    if (extra.agent == agent) {
      extra.epoch = epoch;
      return;
    }
  extras_.push_back({agent, epoch});
  // A long list would be searched on every access: beyond this the thread gets a base of its own.
  constexpr size_t kMaxExtras = 24;
  if (extras_.size() <= kMaxExtras) return;
  for (const Extra& extra : extras_) raise(base_, extra.agent, extra.epoch);
  extras_.clear();
}

void View::forget_extras_in_base() {
  if (!base_) return;
  std::erase_if(extras_, [&](const Extra& extra) { return base_->at(extra.agent) >= extra.epoch; });
}

void View::join(const ClockRef& other) {
  const ClockRef joined = race::join(base_, other);
  if (joined == base_) return;
  base_ = joined;
  released_into_ = 0;
  forget_extras_in_base();
}

void View::join(const View& other) {
  join(other.base_);
  for (const Extra& extra : other.extras_) learn(extra.agent, extra.epoch);
  learn(other.self, other.own);
}

void View::acquire(SyncClock& sync) {
  if (!sync.clock_ || sync.clock_ == base_) return;
  if (released_into_ == sync.serial_) {  // all that this view knows is in there
    base_ = sync.clock_;
    extras_.clear();
    return;
  }
  if (sync.joined_base_ != base_ || sync.joined_clock_ != sync.clock_) {
    sync.joined_base_ = base_;
    sync.joined_clock_ = sync.clock_;
    sync.joined_result_ = race::join(base_, sync.clock_);
  }
  if (base_ == sync.joined_result_) return;
  base_ = sync.joined_result_;
  released_into_ = 0;
  forget_extras_in_base();
}

void SyncClock::gather(const View& view) {
  if (view.base_ && view.base_ != included_) {
    clock_ = race::join(clock_, view.base_);
    included_ = view.base_;
  }
  for (const View::Extra& extra : view.extras_) raise(clock_, extra.agent, extra.epoch);
  if (view.own) raise(clock_, view.self, view.own);
}

uint64_t SyncClock::next_serial() {
  static uint64_t serial = 0;
  return ++serial;
}

}  // namespace emulator::race
