#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/lora_wgrad_sm80.h"
#include "emulated/kernels/neighbours.h"
