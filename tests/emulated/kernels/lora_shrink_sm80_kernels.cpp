#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/lora_shrink_sm80.h"
#include "emulated/kernels/neighbours.h"
