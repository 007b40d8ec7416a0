// The clustered GEMM with planted faults, apart from its host program so that only kernels are
// instrumented.
#include "emulator/specimens/gemm_wgmma.h"

namespace specimens {

using emulator::PlantedFault;
using ptx::Major;

template void prepare_bias<PlantedFault>(const float*, float, float*, int);
template void gemm_wgmma<__nv_bfloat16, Major::kK, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);
template void gemm_wgmma<__nv_bfloat16, Major::kMN, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);
template void gemm_wgmma<__half, Major::kK, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);
template void gemm_wgmma<__half, Major::kMN, PlantedFault>(GemmWgmmaMaps, GemmWgmmaParams);

}  // namespace specimens
