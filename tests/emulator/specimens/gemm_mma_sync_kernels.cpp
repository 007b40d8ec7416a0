// The mma.sync GEMM with planted faults, apart from its host program so that only kernels are
// instrumented.
#include "emulator/specimens/gemm_mma_sync.h"

namespace specimens {

using emulator::PlantedFault;

template void gemm_mma_sync<__nv_bfloat16, false, PlantedFault>(GemmMmaSyncParams<__nv_bfloat16>);
template void gemm_mma_sync<__nv_bfloat16, true, PlantedFault>(GemmMmaSyncParams<__nv_bfloat16>);
template void gemm_mma_sync<__half, false, PlantedFault>(GemmMmaSyncParams<__half>);
template void gemm_mma_sync<__half, true, PlantedFault>(GemmMmaSyncParams<__half>);

}  // namespace specimens
