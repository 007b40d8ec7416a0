// Where accesses were made, and the report of a fault: both accesses, the memory, and the edge that
// is missing between them.
#pragma once

#include "emulator/race/shadow.h"

namespace emulator::race {

// The engine call in progress: `what` and the frames that led to it. Needs frame pointers
// (-fno-omit-frame-pointer).
const Site* call_site(const char* what);
const Site* site_with_name(const Site& site, const char* what);

// Reports a fault of `actor` at `offset` bytes into `region`; `earlier` is the access it conflicts
// with.
/// A block ended although an access of `agent` to its shared memory need not be over.
void report_peer_access(const std::string& block, AgentId agent, const Site* site);
void report_fault(Fault fault, const Region& region, size_t offset, const Actor& actor,
                  const Access& earlier, bool writes, bool earlier_wrote);

}  // namespace emulator::race
