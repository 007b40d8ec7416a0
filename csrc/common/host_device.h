// Functions that host and device code share.
#pragma once

#ifdef __CUDACC__
#define LORA_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LORA_EXT_HOST_DEVICE inline
#endif
