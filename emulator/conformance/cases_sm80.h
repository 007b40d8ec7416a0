// Conformance cases of the functions that run from sm_80 on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/integer.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/sync.h"
#include "ptx/thread.h"

namespace conformance {

namespace ptx = lora_ext::ptx;

// ---- integer.h ----------------------------------------------------------------------------------

__global__ void products_in_halves(const uint32_t* a, const uint32_t* b, uint32_t* low,
                                   uint32_t* high) {
  const uint32_t i = threadIdx.x;
  ptx::mul_wide(low[i], high[i], a[i], b[i]);
}

inline void case_integer(Recorder& recorder) {
  Random random = recorder.begin("integer", {"mul_wide"});
  auto a = recorder.input("a", random.integers<uint32_t>(128));
  auto b = recorder.input("b", random.integers<uint32_t>(128));
  DeviceArray<uint32_t> low(128), high(128);
  launch({1, 128, 0}, products_in_halves, a.data(), b.data(), low.data(), high.data());
  recorder.output("low", low);
  recorder.output("high", high);
}

// ---- thread.h -----------------------------------------------------------------------------------

__global__ void shared_addresses(uint32_t* offsets, uint32_t* alignment) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  offsets[threadIdx.x] =
      ptx::shared_address(shared + 12 * threadIdx.x) - ptx::shared_address(shared);
  if (threadIdx.x == 0) *alignment = ptx::shared_address(shared) % 1024;
}

inline void case_thread(Recorder& recorder) {
  recorder.begin("thread", {"shared_address", "dynamic_shared_memory"});
  DeviceArray<uint32_t> offsets(96), alignment(std::vector<uint32_t>{7});
  launch({1, 96, 2048}, shared_addresses, offsets.data(), alignment.data());
  recorder.output("offsets", offsets);
  recorder.output("alignment", alignment);
}

// ---- sync.h -------------------------------------------------------------------------------------

// Warps 0 and 1 exchange values at barrier 1; warp 2 signals warp 3 at barrier 15.
__global__ void exchange_at_barriers(const uint32_t* in, uint32_t* out) {
  auto* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared_memory());
  const uint32_t warp = threadIdx.x / 32;
  shared[threadIdx.x] = in[threadIdx.x];
  if (warp < 2) {
    ptx::bar_sync(1, 64);
  } else if (warp == 2) {
    ptx::bar_arrive(15, 64);
    return;
  } else {
    ptx::bar_sync(15, 64);
  }
  out[threadIdx.x] = shared[threadIdx.x ^ 32];
}

inline void case_barriers(Recorder& recorder) {
  Random random = recorder.begin("named_barriers", {"bar_sync", "bar_arrive"});
  auto in = recorder.input("in", random.integers<uint32_t>(128));
  DeviceArray<uint32_t> out(128);
  launch({1, 128, 512}, exchange_at_barriers, in.data(), out.data());
  recorder.output("out", out);
}

// ---- memory.h: cp.async -------------------------------------------------------------------------

// Each thread copies 16 bytes twice, in two groups; the data of the first is read while the second
// may be in flight.
__global__ void copies_in_groups(const unsigned char* in, const uint32_t* src_bytes,
                                 unsigned char* out) {
  constexpr uint32_t kBytes = 16;
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t total = blockDim.x * kBytes, mine = threadIdx.x * kBytes;
  for (uint32_t group = 0; group < 2; ++group) {
    ptx::cp_async_16(ptx::shared_address(shared + group * total + mine), in + group * total + mine,
                     src_bytes[group * blockDim.x + threadIdx.x]);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<1>();
  for (uint32_t i = 0; i < kBytes; ++i) out[mine + i] = shared[mine + i];
  ptx::cp_async_wait_group<0>();
  for (uint32_t i = 0; i < kBytes; ++i) out[total + mine + i] = shared[total + mine + i];
}

inline void case_cp_async(Recorder& recorder) {
  constexpr uint32_t kBytes = 16;
  Random random = recorder.begin("cp_async_16",
                                 {"cp_async_16", "cp_async_commit_group", "cp_async_wait_group"});
  auto in = recorder.input("in", random.integers<uint8_t>(2 * 64 * kBytes));
  auto src_bytes = recorder.input("src_bytes", random.integers<uint32_t>(2 * 64, kBytes + 1));
  DeviceArray<uint8_t> out(2 * 64 * kBytes);
  launch({1, 64, 2 * 64 * kBytes}, copies_in_groups, in.data(), src_bytes.data(), out.data());
  recorder.output("out", out);
}

// ---- mma.h: ldmatrix ----------------------------------------------------------------------------

constexpr uint32_t kRowBytes = 16,
                   kRows = 64;  // shared memory of the matrix moves: rows in any order

template <int kCount, bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[kCount], uint32_t address) {
  if constexpr (kCount == 2) {
    static_assert(kTranspose);
    ptx::ldmatrix_x2_trans(r, address);
  } else {
    kTranspose ? ptx::ldmatrix_x4_trans(r, address) : ptx::ldmatrix_x4(r, address);
  }
}

// rows [32]: the row that each lane addresses.
template <int kCount, bool kTranspose>
__global__ void load_rows(const unsigned char* memory, const uint32_t* rows, uint32_t* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  for (uint32_t i = threadIdx.x; i < kRows * kRowBytes; i += 32) shared[i] = memory[i];
  __syncthreads();
  uint32_t r[kCount];
  load_matrices<kCount, kTranspose>(r, ptx::shared_address(shared) + kRowBytes * rows[threadIdx.x]);
  for (int i = 0; i < kCount; ++i) out[i * 32 + threadIdx.x] = r[i];
}

template <int kCount, bool kTranspose>
void case_ldmatrix(Recorder& recorder) {
  const std::string name = "ldmatrix_x" + std::to_string(kCount) + (kTranspose ? "_trans" : "");
  Random random = recorder.begin(name, {name});
  auto memory = recorder.input("memory", random.integers<uint8_t>(kRows * kRowBytes));
  auto rows = recorder.input("rows", random.integers<uint32_t>(32, kRows));
  DeviceArray<uint32_t> out(32 * kCount);
  launch({1, 32, kRows * kRowBytes}, load_rows<kCount, kTranspose>, memory.data(), rows.data(),
         out.data());
  recorder.output("out", out, {kCount, 32});
}

// ---- mma.h --------------------------------------------------------------------------------------

// a [16, 16], b [16, 8], c and d [16, 8], all row-major; the fragments follow the figures of the
// PTX ISA.
template <typename T>
__global__ void multiply_tile(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const uint32_t group = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4);
  const auto two = [](const uint16_t* matrix, uint32_t low, uint32_t high) {
    return matrix[low] | static_cast<uint32_t>(matrix[high]) << 16;
  };
  uint32_t ra[4], rb[2];
  float rd[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t at = (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    ra[i] = two(a, at, at + 1);
  }
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t at = (pair + i * 8) * 8 + group;
    rb[i] = two(b, at, at + 8);
  }
  const auto place = [&](uint32_t i) { return (group + i / 2 * 8) * 8 + pair + i % 2; };
  for (uint32_t i = 0; i < 4; ++i) rd[i] = c[place(i)];
  ptx::mma_m16n8k16<T>(rd, ra, rb);
  for (uint32_t i = 0; i < 4; ++i) d[place(i)] = rd[i];
}

template <typename T>
struct FormatOf;
template <>
struct FormatOf<__nv_bfloat16> {
  static constexpr const char* kName = "bf16";
  static uint16_t round(float value) { return __nv_bfloat16_raw(__float2bfloat16(value)).x; }
};
template <>
struct FormatOf<__half> {
  static constexpr const char* kName = "f16";
  static uint16_t round(float value) { return __half_raw(__float2half(value)).x; }
};

// Operands of a product. With small integers every sum is exact in any order, and the result shows
// the layouts bit by bit.
template <typename T>
std::vector<uint16_t> operand(Random& random, size_t count, bool integers) {
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    value = FormatOf<T>::round(integers ? random.integer(8) : random.number());
  }
  return values;
}
inline std::vector<float> addends(Random& random, size_t count, bool integers) {
  std::vector<float> values(count);
  for (float& value : values) value = integers ? random.integer(1000) : random.number();
  return values;
}

template <typename T>
void case_mma(Recorder& recorder, bool integers) {
  const std::string name = std::string("mma_m16n8k16_") + FormatOf<T>::kName;
  Random random = recorder.begin(name + (integers ? "_integers" : ""), {"mma_m16n8k16"},
                                 integers ? Comparison::kExact : Comparison::kProduct);
  auto a = recorder.input("a", operand<T>(random, 16 * 16, integers), {16, 16});
  auto b = recorder.input("b", operand<T>(random, 16 * 8, integers), {16, 8});
  auto c = recorder.input("c", addends(random, 16 * 8, integers), {16, 8});
  DeviceArray<float> d(16 * 8);
  launch({1, 32}, multiply_tile<T>, a.data(), b.data(), c.data(), d.data());
  recorder.output("d", d, {16, 8});
}

// ---- memory.h and sync.h ------------------------------------------------------------------------

// Each block publishes values and counts itself; the last one reads those of all, as in lora_decode.
__global__ void publish_to_the_last(const uint32_t* in, uint32_t* published, uint32_t* arrivals,
                                    uint32_t* out) {
  auto* const is_last = reinterpret_cast<uint32_t*>(ptx::dynamic_shared_memory());
  const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
  published[place] = in[place] + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::fence_acq_rel_gpu();
    *is_last = ptx::atomic_add_relaxed_gpu(arrivals, 1) == gridDim.x - 1;
    ptx::fence_acq_rel_gpu();
  }
  __syncthreads();
  const uint32_t count = gridDim.x * blockDim.x;
  for (uint32_t i = threadIdx.x; *is_last != 0 && i < count; i += blockDim.x)
    out[i] = published[count - 1 - i];
}

inline void case_last_block(Recorder& recorder) {
  Random random = recorder.begin("last_block", {"atomic_add_relaxed_gpu", "fence_acq_rel_gpu"});
  auto in = recorder.input("in", random.integers<uint32_t>(4 * 64));
  DeviceArray<uint32_t> published(4 * 64), arrivals(1), out(4 * 64);
  launch({4, 64, 4}, publish_to_the_last, in.data(), published.data(), arrivals.data(), out.data());
  recorder.output("out", out);
}

// The order of the old values that atomics return is not fixed: their sum is.
__global__ void count_in_any_order(const uint32_t* in, uint32_t* counters) {
  ptx::atomic_add_relaxed_gpu(counters, in[threadIdx.x]);
  const uint32_t old = ptx::atomic_add_relaxed_gpu(counters + 1, 1);
  ptx::atomic_add_relaxed_gpu(counters + 2, old * old);
}

inline void case_atomics(Recorder& recorder) {
  Random random = recorder.begin("atomics", {"atomic_add_relaxed_gpu"});
  auto in = recorder.input("in", random.integers<uint32_t>(64));
  DeviceArray<uint32_t> counters(3);
  launch({4, 64}, count_in_any_order, in.data(), counters.data());
  recorder.output("counters", counters);
}

inline void record_sm80(Recorder& recorder) {
  case_integer(recorder);
  case_thread(recorder);
  case_barriers(recorder);
  case_cp_async(recorder);
  case_ldmatrix<4, false>(recorder);
  case_ldmatrix<2, true>(recorder);
  case_ldmatrix<4, true>(recorder);
  for (bool integers : {false, true}) {
    case_mma<__nv_bfloat16>(recorder, integers);
    case_mma<__half>(recorder, integers);
  }
  case_last_block(recorder);
  case_atomics(recorder);
}

}  // namespace conformance
