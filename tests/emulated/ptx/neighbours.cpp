// The grids of tests before, between and after the kernels: the only ones that g++ compiles here.
#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/neighbours.h"

#include "emulated/kernels/launch.h"
