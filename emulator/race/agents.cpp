// Bookkeeping of threads and asynchronous operations; see agents.h.
#include "emulator/race/agents.h"

#include <algorithm>

#include "emulator/race/report.h"

namespace emulator::race {
namespace {

void start(View& view, AgentId id, Epoch own) {
  view = View();
  view.self = id;
  view.own = own;
}

}  // namespace

void Agents::begin_launch() {
  blocks_.clear();
  running_.clear();
  clusters_.clear();
  threads_.clear();
  free_threads_.clear();
  operations_.clear();
}

ThreadState& Agents::begin_thread(Thread& thread) {
  const Block& block = thread.block();
  auto [found, is_new] = running_.try_emplace(&block, static_cast<uint32_t>(blocks_.size()));
  if (is_new) {
    auto [cluster, is_new_cluster] =
        clusters_.try_emplace(block.cluster, ClusterInfo{next_cluster_, 0});
    next_cluster_ += is_new_cluster;
    blocks_.push_back({block.index,
                       block.grid().index,
                       block.thread_count,
                       cluster->second.serial,
                       0,
                       {},
                       {},
                       {}});
  }
  if (free_threads_.empty()) {
    free_threads_.push_back(static_cast<uint32_t>(threads_.size()));
    threads_.push_back(nullptr);
  }
  thread.race_id = free_threads_.back();
  free_threads_.pop_back();
  BlockInfo& info = blocks_[found->second];
  auto state = std::make_unique<ThreadState>();
  state->id = {found->second, thread.linear};
  state->cluster = info.cluster;
  start(state->knowledge.seen, state->id, 1);
  for (View& view : state->knowledge.proxied) start(view, state->id, 0);
  start(state->knowledge.performed, state->id, 0);
  threads_[thread.race_id] = std::move(state);
  return *threads_[thread.race_id];
}

void Agents::end_thread(Thread& thread) {
  const Block& block = thread.block();
  BlockInfo& info = blocks_[state(thread).id.block];
  info.known_at_exit.release(state(thread).knowledge.seen);
  info.known_at_exit.release(state(thread).knowledge.performed);
  threads_[thread.race_id] = nullptr;
  free_threads_.push_back(thread.race_id);
  if (++info.ended < info.threads) return;
  check_peer_accesses(info);
  // The memory of Block and Cluster may be reused: remove what refers to it.
  running_.erase(&block);
  if (++clusters_[block.cluster].blocks_ended == block.cluster->blocks.size())
    clusters_.erase(block.cluster);
}

void Agents::peer_access(const ThreadState& thread, const Block& peer, const Site* site) {
  const auto found = running_.find(&peer);
  if (found == running_.end() || found->second == thread.id.block) return;
  auto& accesses = blocks_[found->second].peer_accesses;
  const auto last = std::find_if(accesses.begin(), accesses.end(),
                                 [&](const auto& access) { return access.agent == thread.id; });
  const BlockInfo::PeerAccess access{thread.id, thread.epoch(), site};
  last == accesses.end() ? accesses.push_back(access) : void(*last = access);
}

void Agents::check_peer_accesses(const BlockInfo& block) const {
  const ClockRef& known = block.known_at_exit.clock();
  for (const auto& access : block.peer_accesses) {
    if (known && known->at(access.agent) >= access.epoch) continue;
    const uint3& at = block.index;
    report_peer_access(format("block (%u,%u,%u)", at.x, at.y, at.z), access.agent, access.site);
  }
}

uint32_t Agents::fork(ThreadState& thread, Proxy proxy, const Site* issued_at) {
  // An operation reuses the name of an earlier one only if its issuer knows that one to be
  // complete: then "knows the later" implies "knows the earlier", which is what a vector clock can
  // express.
  OperationState* state = nullptr;
  uint32_t index = 0;
  for (uint32_t candidate : thread.operations) {
    OperationState& earlier = *operations_[candidate];
    if (!earlier.complete || earlier.proxy != proxy) continue;
    if (!thread.knowledge.seen.knows(earlier.id, earlier.epoch)) continue;
    state = &earlier;
    index = candidate;
    break;
  }
  if (!state) {
    BlockInfo& block = blocks_[thread.id.block];
    index = static_cast<uint32_t>(operations_.size());
    operations_.push_back(std::make_unique<OperationState>());
    state = operations_.back().get();
    state->id = {thread.id.block, block.threads + static_cast<uint32_t>(block.slots.size())};
    block.slots.push_back({thread.id.index, proxy});
    thread.operations.push_back(index);
  }
  ++state->epoch;
  state->proxy = proxy;
  state->complete = false;
  state->issuer = thread.knowledge;
  state->issued_at = issued_at;
  thread.next_epoch();  // what the thread does from here on is not ordered before the operation
  return index;
}

Actor Agents::actor(uint32_t index, const char* what) {
  const OperationState& state = *operations_[index];
  Actor actor;
  actor.id = state.id;
  actor.epoch = state.epoch;
  actor.seen = &state.issuer.seen;
  actor.performed = &state.issuer.performed;
  actor.flags = kAsynchronous;
  if (state.proxy == Proxy::Async) {
    actor.flags |= kAsyncProxy;
    for (int space = 0; space < 2; ++space)
      actor.through_proxy[space] = &state.issuer.proxied[space];
  }
  actor.site = site_with_name(*state.issued_at, what);
  return actor;
}

std::string Agents::name(AgentId agent) const {
  if (agent.block >= blocks_.size()) return "the host";
  const BlockInfo& block = blocks_[agent.block];
  const bool asynchronous = agent.index >= block.threads;
  const uint32_t thread =
      asynchronous ? block.slots[agent.index - block.threads].issuer : agent.index;
  std::string text = asynchronous ? "an asynchronous operation issued by " : "";
  text += format("block (%u,%u,%u) thread %u = warp %u lane %u", block.index.x, block.index.y,
                 block.index.z, thread, thread / kWarpSize, thread % kWarpSize);
  if (block.grid) text += format(" of grid %u", block.grid);
  return text;
}

}  // namespace emulator::race
