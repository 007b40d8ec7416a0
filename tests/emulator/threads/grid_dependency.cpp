// When a dependent grid may start, and what griddepcontrol.wait waits for.
#include "emulator/threads/grid_dependency.h"

#include "emulator/machine/scheduler.h"

namespace emulator {
namespace {

void signal(Block& block) {
  if (block.launched_dependents) return;
  block.launched_dependents = true;
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
  const Grid& grid = current_thread().block().grid();
  if (grid.previous == nullptr) return;
  while (!grid.previous->complete) block_on(grid.previous->completion);
  acquire_grids_before(grid);
}

void griddepcontrol_launch_dependents() {
  signal(current_thread().block());
  preemption_point();
}

void acquire_grids_before(const Grid& grid) {
  for (const Grid* before = grid.previous; before != nullptr; before = before->previous) {
    race_acquire(before);
  }
}

bool may_start(const Grid& grid) {
  if (grid.previous == nullptr || grid.previous->complete) return true;
  return grid.launch.programmatic_dependent && grid.previous->blocks_to_signal == 0;
}

void grid_dependency_block_exits(Block& block) { signal(block); }

}  // namespace emulator
