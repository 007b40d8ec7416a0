// What the package's programs plant.
#pragma once

namespace emulated {

// Plants the mutant of this name. One that the copies do not have ends the process, as nothing
// would be wrong.
void plant_known_fault(const char* mutant);

}  // namespace emulated
