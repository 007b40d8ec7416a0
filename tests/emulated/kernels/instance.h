// INSTANCE(kernel<...>(...)) declares an instance of a kernel, which is linked. PROGRAM_kernels.cpp
// compiles those of its program, apart from the host program, so that only kernels are
// instrumented: there INSTANCE says `template`. Where a tool is to read all kernels in one file, it
// says ALL_KERNELS_IN_THIS_FILE, and nothing is declared.
//
// Runs of PTX compile no instance. They take EVERY_INSTANCE that csrc/kernels/launch/ has, and those
// lists are made of the types below; the others are of those that g++ compiles.
#pragma once

#ifndef INSTANCE
#ifdef ALL_KERNELS_IN_THIS_FILE
#define INSTANCE(...)
#else
#define INSTANCE(...) extern template __global__ void __VA_ARGS__;
#endif
#endif

// Of sequences, whose launches are the same for both types, only bf16's where every access is
// instrumented, which compiles for minutes. The kernels' own programs run both there.
#if defined(EMULATOR_RACE) || defined(__SANITIZE_ADDRESS__)
#define IF_BOTH_TYPES(...)
#else
#define IF_BOTH_TYPES(...) __VA_ARGS__
#endif

// Sizes of lora_gemm whose last chunk, of seven columns, is in each of a warp's slabs.
#ifdef EVERY_INSTANCE
#define SIZES_OF_SLABS \
  {"slab_0", 61, 71, 24}, {"slab_1", 61, 23, 24}, {"slab_2", 61, 39, 24}, {"slab_3", 61, 55, 24},
#else
#define SIZES_OF_SLABS
#endif

// X(variant, T, ...), and X(variant, T, the factors' type, ...)
#define EVERY_HALF(X, name, ...)            \
  X(bf16##name, __nv_bfloat16, __VA_ARGS__) \
  X(fp16##name, __half, __VA_ARGS__)
#define EVERY_PAIR(X, name, ...)                           \
  X(bf16##name, __nv_bfloat16, __nv_bfloat16, __VA_ARGS__) \
  X(fp16##name, __half, __half, __VA_ARGS__)               \
  X(float_bf16##name, __nv_bfloat16, float, __VA_ARGS__)   \
  X(float_fp16##name, __half, float, __VA_ARGS__)
