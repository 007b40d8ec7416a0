// CUTLASS' wrappers under the names and signatures of csrc/ptx/, so that one kernel source compiles
// with either. Only functions that CUTLASS has; the others are judged by their PTX text alone.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#define CUTLASS_ENABLE_GDC_FOR_SM90
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/arch.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/memory.h>
#include <cutlass/arch/memory_sm80.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/barrier.h>
#include <cutlass/semaphore.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace cutlass_adapter {

#define ADAPTER __device__ __forceinline__

// CUTLASS takes generic pointers to shared memory and converts them back.
template <typename T>
ADAPTER T* pointer(uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}
ADAPTER uint64_t* barrier(uint32_t address) { return pointer<uint64_t>(address); }

ADAPTER uint32_t cluster_rank() { return cute::block_rank_in_cluster(); }
ADAPTER uint32_t shared_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }
ADAPTER uint32_t map_shared(uint32_t address, uint32_t rank) {
  return cute::set_block_rank(address, rank);
}

// The Reserved overloads take the identifier itself; the others add the number of reserved
// barriers.
ADAPTER void bar_sync(uint32_t id, uint32_t threads) {
  cutlass::arch::NamedBarrier::sync(threads, cutlass::arch::ReservedNamedBarriers(id));
}
ADAPTER void bar_arrive(uint32_t id, uint32_t threads) {
  cutlass::arch::NamedBarrier::arrive(threads, cutlass::arch::ReservedNamedBarriers(id));
}
ADAPTER void cluster_arrive() { cute::cluster_arrive(); }
ADAPTER void cluster_arrive_relaxed() { cute::cluster_arrive_relaxed(); }
ADAPTER void cluster_wait() { cute::cluster_wait(); }

ADAPTER void cp_async_16(uint32_t dst, const void* src, uint32_t bytes) {
  using Copy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;
  Copy::copy(*static_cast<const cute::uint128_t*>(src), *pointer<cute::uint128_t>(dst), bytes != 0);
}
ADAPTER void cp_async_commit_group() { cute::cp_async_fence(); }
template <int kPending>
ADAPTER void cp_async_wait_group() {
  cutlass::arch::cp_async_wait<kPending>();
}

#define LDMATRIX(name, count, Copy, ...)                               \
  ADAPTER void name(uint32_t (&r)[count], uint32_t address) {          \
    cute::Copy::copy(*pointer<cute::uint128_t>(address), __VA_ARGS__); \
  }
LDMATRIX(ldmatrix_x4, 4, SM75_U32x4_LDSM_N, r[0], r[1], r[2], r[3])
LDMATRIX(ldmatrix_x2_trans, 2, SM75_U16x4_LDSM_T, r[0], r[1])
LDMATRIX(ldmatrix_x4_trans, 4, SM75_U16x8_LDSM_T, r[0], r[1], r[2], r[3])
#undef LDMATRIX
ADAPTER void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  cute::SM90_U32x4_STSM_N::copy(r[0], r[1], r[2], r[3], *pointer<cute::uint128_t>(address));
}

template <typename T>
ADAPTER void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Mma = std::conditional_t<std::is_same_v<T, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                 cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
}

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;
ADAPTER void mbarrier_init(uint32_t bar, uint32_t count) { Barrier::init(barrier(bar), count); }
ADAPTER void mbarrier_arrive_remote(uint32_t bar, uint32_t rank) {
  Barrier::arrive(barrier(bar), rank, 1);
}
ADAPTER void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  TransactionBarrier::arrive_and_expect_tx(barrier(bar), bytes);
}
ADAPTER bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  return Barrier::try_wait(barrier(bar), parity);
}
ADAPTER void fence_mbarrier_init() { cutlass::arch::fence_barrier_init(); }
ADAPTER void fence_proxy_async_shared() { cutlass::arch::fence_view_async_shared(); }

constexpr auto kNoHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
ADAPTER void prefetch_tensor_map(const CUtensorMap* map) { cute::prefetch_tma_descriptor(map); }
ADAPTER void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y) {
  cute::SM90_TMA_LOAD_2D::copy(map, barrier(bar), kNoHint, pointer<void>(dst), x, y);
}
ADAPTER void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y,
                                   uint16_t mask) {
  using Copy = cute::SM90_TMA_LOAD_MULTICAST_2D;
  Copy::copy(map, barrier(bar), mask, kNoHint, pointer<void>(dst), x, y);
}
ADAPTER void tma_store_2d(const CUtensorMap* map, uint32_t src, int x, int y) {
  cute::SM90_TMA_STORE_2D::copy(map, pointer<void>(src), x, y);
}
ADAPTER void bulk_commit_group() { cute::tma_store_arrive(); }
template <int kPending>
ADAPTER void bulk_wait_group_read() {
  cute::tma_store_wait<kPending>();
}

template <int kRegisters>
ADAPTER void setmaxnreg_dec() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
ADAPTER void setmaxnreg_inc() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}
ADAPTER void griddepcontrol_wait() { cutlass::arch::wait_on_dependent_grids(); }
ADAPTER void griddepcontrol_launch_dependents() { cutlass::arch::launch_dependent_grids(); }

namespace gmma = cute::SM90::GMMA;
enum class Major { kK, kMN };
template <Major kMajor>
constexpr gmma::Major kGmma = kMajor == Major::kK ? gmma::Major::K : gmma::Major::MN;
ADAPTER void wgmma_fence() { cute::warpgroup_arrive(); }
template <int kCount>
ADAPTER void wgmma_pin(float (&d)[kCount]) {
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(d[i]);
}
ADAPTER void wgmma_commit_group() { cute::warpgroup_commit_batch(); }
template <int kPending>
ADAPTER void wgmma_wait_group() {
  cute::warpgroup_wait<kPending>();
}

template <typename T, int N, gmma::Major A, gmma::Major B>
struct Wgmma;
#define WGMMA(n)                                           \
  template <gmma::Major A, gmma::Major B>                  \
  struct Wgmma<__nv_bfloat16, n, A, B> {                   \
    using Ss = gmma::MMA_64x##n##x16_F32BF16BF16_SS<A, B>; \
  };                                                       \
  template <gmma::Major A, gmma::Major B>                  \
  struct Wgmma<__half, n, A, B> {                          \
    using Ss = gmma::MMA_64x##n##x16_F32F16F16_SS<A, B>;   \
  };
WGMMA(64)
WGMMA(192)
WGMMA(256)
#undef WGMMA

template <typename Mma, size_t... I>
ADAPTER void fma_ss(float* d, uint64_t a, uint64_t b, gmma::ScaleOut scale,
                    std::index_sequence<I...>) {
  Mma::fma(a, b, d[I]..., scale);
}
template <typename T, int N, Major kMajorA, Major kMajorB>
ADAPTER void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  using Mma = typename Wgmma<T, N, kGmma<kMajorA>, kGmma<kMajorB>>::Ss;
  fma_ss<Mma>(d, a, b, gmma::ScaleOut(accumulate), std::make_index_sequence<N / 2>());
}

}  // namespace cutlass_adapter
