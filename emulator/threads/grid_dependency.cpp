// When a dependent grid may start, and what griddepcontrol.wait waits for.
#include "emulator/threads/grid_dependency.h"

#include "emulator/machine/scheduler.h"

namespace emulator {
namespace {

void signal(Block& block, bool publishes_start, bool publishes_wait) {
  if (block.launched_dependents) return;
  block.launched_dependents = true;
  if (publishes_start) block.grid().dependents_follow_its_start = true;
  if (publishes_wait) block.grid().dependents_follow_the_one_before = true;
  if (--block.grid().blocks_to_signal == 0) {
    machine().residency_changed = true;
    note_progress();
  }
}

}  // namespace

std::string GridCompletion::describe() const {
  return format("griddepcontrol.wait: grid %u of the stream has %u clusters left", grid->index,
                grid->clusters_left);
}

void griddepcontrol_wait() {
  Block& block = current_thread().block();
  Grid* before = block.grid().previous;
  if (before == nullptr) return;
  while (!before->complete) block_on(before->completion);
  block.waited_for_grid_before = true;
  race_acquire(before);
}

void griddepcontrol_launch_dependents() {
  const Thread& thread = current_thread();
  signal(thread.block(), thread.fenced, thread.fenced_behind_wait);
  preemption_point();
}

void grid_dependency_fence(Thread& thread) {
  thread.fenced = true;
  thread.fenced_behind_wait = thread.block().waited_for_grid_before;
}

void acquire_at_start(const Grid& grid) {
  const Grid* before = grid.previous;
  if (before == nullptr) return;
  if (!grid.launch.programmatic_dependent) {
    race_acquire(before);
    // PTX ISA 8.9.4, API synchronization: the completion of a task in a stream synchronizes with
    // the start of the next one, and these mechanisms "also participate in proxy-preserved base
    // causality order". So no proxy fence is due for what earlier grids wrote. (Not so the
    // tensormap proxy; our maps are kernel parameters.) griddepcontrol.wait is not among the
    // mechanisms: what it alone orders passes to another proxy by a fence.
    return race_proxy_fence(Space::Global);
  }
  // A dependent starts after what was complete when the grid before it started or called
  // launch_dependents, as far as a fence there publishes it.
  if (before->dependents_follow_its_start) acquire_at_start(*before);
  if (before->previous != nullptr && before->dependents_follow_the_one_before)
    race_acquire(before->previous);
}

bool may_start(const Grid& grid) {
  if (grid.previous == nullptr || grid.previous->complete) return true;
  return grid.launch.programmatic_dependent && grid.previous->blocks_to_signal == 0;
}

void grid_dependency_block_exits(Block& block) {
  signal(block, true, block.waited_for_grid_before);
}

}  // namespace emulator
