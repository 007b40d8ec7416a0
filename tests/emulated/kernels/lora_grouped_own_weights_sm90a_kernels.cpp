#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/lora_grouped_own_weights_sm90a.h"
