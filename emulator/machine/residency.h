// Which clusters and blocks are on the machine: from the start of a cluster to its end, and what is
// checked at each exit.
#pragma once
#include "emulator/machine/machine.h"

namespace emulator {

/// Retires clusters and grids that have ended, and makes as many clusters resident as may be.
/// Returns false when all grids are complete.
bool update_residency();

/// Creates the fibers of a resident block: until then not one of its threads has executed anything.
void start_block(Block& block);

/// Checks that the current thread, and its warp and block if it is the last, leaves nothing
/// unfinished.
void thread_exits(Thread& thread);

/// Forgets all grids, clusters and threads, finished or not.
void clear_machine();

}  // namespace emulator
