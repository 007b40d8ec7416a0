// An accumulator that a kernel forgets to clear shows in the result:
// -ftrivial-auto-var-init=pattern fills it with -1.7e38 (0xFE bytes).
#include <cmath>

#include "emulator/selftests/race_kernels.h"
#include "ptx/mma.h"

namespace emulator::selftest {
namespace {

TEST(an_accumulator_that_is_not_cleared_shows) {
  for (bool cleared : {true, false}) {
    GlobalBuffer<float> result(32, "result");
    launch(race_launch(1, 32), [&] {
      float d[4];
      if (cleared)
        for (float& value : d) value = 0;
      const uint32_t a[4] = {}, b[2] = {};
      lora_ext::ptx::mma_m16n8k16<__half>(d, a, b);
      result[threadIdx.x] = d[0];
    });
    for (float value : result) CHECK(cleared ? value == 0 : std::abs(value) > 1e38f);
  }
}

}  // namespace
}  // namespace emulator::selftest
