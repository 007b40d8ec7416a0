// Plants mutants in the package's programs.
#pragma once

namespace emulated {

// Plants the mutant of this name. If the copies do not have it, the process ends, since no fault
// would be planted.
void plant_known_fault(const char* mutant);

}  // namespace emulated
