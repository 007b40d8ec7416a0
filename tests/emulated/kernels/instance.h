// INSTANCE(kernel<...>(...)) declares an instance of a kernel, which is linked. PROGRAM_kernels.cpp
// compiles those of its program, apart from the host program, so that only kernels are
// instrumented: there INSTANCE says `template`. Where a tool is to read all kernels in one file, it
// says ALL_KERNELS_IN_THIS_FILE, and nothing is declared.
#pragma once

#ifndef INSTANCE
#ifdef ALL_KERNELS_IN_THIS_FILE
#define INSTANCE(...)
#else
#define INSTANCE(...) extern template __global__ void __VA_ARGS__;
#endif
#endif
