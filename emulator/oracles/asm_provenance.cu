// One kernel per function of csrc/ptx/, so that the PTX of the function's inline asm can be read
// with the kernel's parameters as the names of its operands. asm_provenance.py reads it.
//
// Compiled twice: with JUDGE_CUTLASS the same kernels call CUTLASS' wrapper. A kernel under
// WITHOUT_COUNTERPART calls a function that CUTLASS lacks. clobber_<function> shows whether the
// compiler may keep a value of memory in a register across the asm: it must not where the function
// orders or moves memory.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef JUDGE_CUTLASS
#include "cutlass_adapter.h"
namespace ptx = cutlass_adapter;
#define WITHOUT_COUNTERPART(...)
#define CLOBBER(...)
#else
#include "ptx/integer.h"
#include "ptx/mbarrier.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/sync.h"
#include "ptx/thread.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
namespace ptx = lora_ext::ptx;
#define WITHOUT_COUNTERPART(...) __VA_ARGS__
#define CLOBBER(name, parameters, ...)                                                        \
  extern "C" __global__ void clobber_##name(uint32_t* probe, uint32_t* out JOIN parameters) { \
    *probe = 1;                                                                               \
    __VA_ARGS__;                                                                              \
    *out = *probe;                                                                            \
  }
#endif
#define JOIN(...) __VA_OPT__(, ) __VA_ARGS__

// A function without result: its parameters are the kernel's.
#define VOID(name, parameters, ...)                           \
  extern "C" __global__ void name parameters { __VA_ARGS__; } \
  CLOBBER(name, parameters, __VA_ARGS__)
// A function with a result, which the kernel stores at `out`.
#define VALUE(name, Type, parameters, ...) \
  extern "C" __global__ void name(Type* out JOIN parameters) { *out = __VA_ARGS__; }

WITHOUT_COUNTERPART(extern "C" __global__ void mul_wide(uint32_t* out, uint32_t a, uint32_t b) {
  ptx::mul_wide(out[0], out[1], a, b);
})

VALUE(cluster_rank, uint32_t, (), ptx::cluster_rank())
VALUE(shared_address, uint32_t, (const void* p), ptx::shared_address(p))
VALUE(map_shared, uint32_t, (uint32_t address, uint32_t rank), ptx::map_shared(address, rank))
WITHOUT_COUNTERPART(VALUE(dynamic_shared_memory, unsigned char*, (), ptx::dynamic_shared_memory()))
WITHOUT_COUNTERPART(VALUE(elect_sync, uint32_t, (), ptx::elect_sync()))

VOID(bar_sync, (uint32_t id, uint32_t threads), ptx::bar_sync(id, threads))
VOID(bar_arrive, (uint32_t id, uint32_t threads), ptx::bar_arrive(id, threads))
VOID(cluster_arrive, (), ptx::cluster_arrive())
VOID(cluster_arrive_relaxed, (), ptx::cluster_arrive_relaxed())
VOID(cluster_wait, (), ptx::cluster_wait())

VOID(cp_async_16, (uint32_t dst, const void* src, uint32_t valid),
     ptx::cp_async_16(dst, src, valid ? 16 : 0))
VOID(cp_async_commit_group, (), ptx::cp_async_commit_group())
VOID(cp_async_wait_group, (), ptx::cp_async_wait_group<3>())

#define LDMATRIX(name, count)                                                                   \
  extern "C" __global__ void name(uint32_t* out, uint32_t address) {                            \
    uint32_t r[count];                                                                          \
    ptx::name(r, address);                                                                      \
    for (int i = 0; i < count; ++i) out[i] = r[i];                                              \
  }                                                                                             \
  CLOBBER(name, (uint32_t address, uint32_t* loaded), uint32_t r[count]; ptx::name(r, address); \
          for (int i = 0; i < count; ++i) loaded[i] = r[i])
LDMATRIX(ldmatrix_x4, 4)
LDMATRIX(ldmatrix_x2_trans, 2)
LDMATRIX(ldmatrix_x4_trans, 4)

VOID(stmatrix_x4, (uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3),
     const uint32_t r[] = {r0, r1, r2, r3};
     ptx::stmatrix_x4(address, r))

#define MMA(suffix, T)                                                                        \
  extern "C" __global__ void mma_m16n8k16_##suffix(float* accumulators, const uint32_t* a_in, \
                                                   const uint32_t* b_in) {                    \
    float d[4];                                                                               \
    const uint32_t a[4] = {a_in[0], a_in[1], a_in[2], a_in[3]}, b[2] = {b_in[0], b_in[1]};    \
    for (int i = 0; i < 4; ++i) d[i] = accumulators[i];                                       \
    ptx::mma_m16n8k16<T>(d, a, b);                                                            \
    for (int i = 0; i < 4; ++i) accumulators[i] = d[i];                                       \
  }
MMA(bf16, __nv_bfloat16)
MMA(f16, __half)

VOID(mbarrier_init, (uint32_t bar, uint32_t count), ptx::mbarrier_init(bar, count))
VOID(mbarrier_arrive_remote, (uint32_t bar, uint32_t rank), ptx::mbarrier_arrive_remote(bar, rank))
VOID(mbarrier_arrive_expect_tx, (uint32_t bar, uint32_t bytes),
     ptx::mbarrier_arrive_expect_tx(bar, bytes))
VALUE(mbarrier_try_wait, uint32_t, (uint32_t bar, uint32_t parity),
      ptx::mbarrier_try_wait(bar, parity))
CLOBBER(mbarrier_try_wait, (uint32_t bar, uint32_t parity, uint32_t* completed),
        *completed = ptx::mbarrier_try_wait(bar, parity))
WITHOUT_COUNTERPART(VOID(mbarrier_wait, (uint32_t bar, uint32_t parity),
                         ptx::mbarrier_wait(bar, parity)))
VOID(fence_mbarrier_init, (), ptx::fence_mbarrier_init())

VOID(fence_proxy_async_shared, (), ptx::fence_proxy_async_shared())
WITHOUT_COUNTERPART(VOID(fence_proxy_async_global, (), ptx::fence_proxy_async_global()))
WITHOUT_COUNTERPART(VOID(fence_acq_rel_gpu, (), ptx::fence_acq_rel_gpu()))

VOID(prefetch_tensor_map, (const __grid_constant__ CUtensorMap map), ptx::prefetch_tensor_map(&map))
VOID(tma_load_2d,
     (uint32_t dst, const __grid_constant__ CUtensorMap map, uint32_t bar, int x, int y),
     ptx::tma_load_2d(dst, &map, bar, x, y))
VOID(tma_load_2d_multicast,
     (uint32_t dst, const __grid_constant__ CUtensorMap map, uint32_t bar, int x, int y,
      uint16_t mask),
     ptx::tma_load_2d_multicast(dst, &map, bar, x, y, mask))
VOID(tma_store_2d, (const __grid_constant__ CUtensorMap map, uint32_t src, int x, int y),
     ptx::tma_store_2d(&map, src, x, y))
VOID(bulk_commit_group, (), ptx::bulk_commit_group())
VOID(bulk_wait_group_read, (), ptx::bulk_wait_group_read<3>())
WITHOUT_COUNTERPART(VOID(bulk_wait_group, (), ptx::bulk_wait_group<3>()))

VOID(setmaxnreg_dec, (), ptx::setmaxnreg_dec<40>())
VOID(setmaxnreg_inc, (), ptx::setmaxnreg_inc<232>())
VOID(griddepcontrol_wait, (), ptx::griddepcontrol_wait())
VOID(griddepcontrol_launch_dependents, (), ptx::griddepcontrol_launch_dependents())

WITHOUT_COUNTERPART(VALUE(atomic_add_relaxed_gpu, uint32_t, (uint32_t* counter, uint32_t value),
                          ptx::atomic_add_relaxed_gpu(counter, value)))
CLOBBER(atomic_add_relaxed_gpu, (uint32_t* counter, uint32_t value, uint32_t* old),
        *old = ptx::atomic_add_relaxed_gpu(counter, value))

VOID(wgmma_fence, (), ptx::wgmma_fence())
extern "C" __global__ void wgmma_pin(float* accumulators) {
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = accumulators[i];
  ptx::wgmma_pin(d);
  for (int i = 0; i < 4; ++i) accumulators[i] = d[i];
}
CLOBBER(wgmma_pin, (float* accumulators), float d[1] = {*accumulators}; ptx::wgmma_pin(d);
        *accumulators = d[0])
VOID(wgmma_commit_group, (), ptx::wgmma_commit_group())
VOID(wgmma_wait_group, (), ptx::wgmma_wait_group<3>())

// The accumulators come from and go to `d`, so that the place of each in the operand list is seen.
#define WGMMA_SS(suffix, T, n, A, B)                                                              \
  extern "C" __global__ void wgmma_ss_##suffix##_##n##_##A##_##B(float* accumulators, uint64_t a, \
                                                                 uint64_t b, uint32_t add) {      \
    float d[n / 2];                                                                               \
    for (int i = 0; i < n / 2; ++i) d[i] = accumulators[i];                                       \
    ptx::wgmma_ss<T, n, ptx::Major::A, ptx::Major::B>(d, a, b, add != 0);                         \
    for (int i = 0; i < n / 2; ++i) accumulators[i] = d[i];                                       \
  }
#define WGMMA(suffix, T, n)       \
  WGMMA_SS(suffix, T, n, kK, kK)  \
  WGMMA_SS(suffix, T, n, kK, kMN) \
  WGMMA_SS(suffix, T, n, kMN, kK) \
  WGMMA_SS(suffix, T, n, kMN, kMN)
#define WGMMA_BOTH(n)           \
  WGMMA(bf16, __nv_bfloat16, n) \
  WGMMA(f16, __half, n)
WGMMA_BOTH(64)
WGMMA_BOTH(192)
WGMMA_BOTH(256)
