// The one machine of the process.
#include "emulator/machine/machine.h"

namespace emulator::detail {

Machine the_machine;

void fail_outside_kernel() {
  fail(ErrorKind::Misuse, "a device instruction was called outside of a kernel");
}

}  // namespace emulator::detail
