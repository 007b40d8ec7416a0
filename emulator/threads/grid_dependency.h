// Programmatic dependent launch (griddepcontrol).
#pragma once

namespace emulator {

struct Grid;
struct Block;
struct Thread;

void griddepcontrol_wait();
void griddepcontrol_launch_dependents();
/// The thread has executed a fence of device scope: launch_dependents publishes what precedes it.
void grid_dependency_fence(Thread& thread);

/// For the race checker: what happens before the start of each thread of `grid`. That is the grid
/// before it, and with it all that its threads have waited for. For a programmatic dependent it is
/// only what the one before started behind, and the grid that some block of that one waited for, each
/// if the thread that called launch_dependents had executed a fence behind it: a call publishes
/// nothing that its own grid writes. What precedes an ordinary start precedes it in every proxy.
void acquire_at_start(const Grid& grid);
/// Whether `grid` may have resident blocks now: the grid before it is complete, or, for a
/// programmatic dependent, every block of that one has exited or called launch_dependents.
bool may_start(const Grid& grid);
/// The block has exited: that counts as launch_dependents.
void grid_dependency_block_exits(Block& block);

}  // namespace emulator
