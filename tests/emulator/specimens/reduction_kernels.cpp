// The reductions with planted faults, apart from their host program so that only kernels are
// instrumented.
#include "emulator/specimens/reduction.h"

template void specimens::ordered_sum<emulator::PlantedFault>(specimens::OrderedSumParams);
template void specimens::sum_and_max<emulator::PlantedFault>(specimens::SumAndMaxParams);
