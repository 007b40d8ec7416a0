// Programmatic dependent launch (griddepcontrol).
#pragma once

namespace emulator {

struct Grid;
struct Block;

void griddepcontrol_wait();
void griddepcontrol_launch_dependents();

/// For the race checker: what the grids before `grid` did happens before what the current thread
/// does.
void acquire_grids_before(const Grid& grid);
/// Whether `grid` may have resident blocks now: the grid before it is complete, or, for a
/// programmatic dependent, every block of that one has exited or called launch_dependents.
bool may_start(const Grid& grid);
/// The block has exited: that counts as launch_dependents.
void grid_dependency_block_exits(Block& block);

}  // namespace emulator
