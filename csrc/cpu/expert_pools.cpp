// Processes one row of B at a time, for all experts: a row is some KB of contiguous memory, and
// stays in the cache while the numbers of one expert after the other are copied from it or to it.
#include "cpu/expert_pools.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

namespace lora_ext::cpu {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers worth a thread's start

// Calls run(number in b, number in the pool) for each number of the experts `hit`. Bits is an
// unsigned integer of the element's size.
template <class Bits, class Run>
void for_numbers(void* b, const at::Tensor& hit, int64_t experts, void* pool, int64_t rows,
                 int64_t rank, const Run& run) {
  const int64_t count = hit.numel();
  const int64_t* number = hit.const_data_ptr<int64_t>();
  auto *first = static_cast<Bits*>(b), *to = static_cast<Bits*>(pool);
  const int64_t grain = kGrain / std::max<int64_t>(1, count * rank) + 1;
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Bits* row = first + n * rank * experts;
      for (int64_t i = 0; i < count; ++i) {
        Bits* own = to + (i * rows + n) * rank;
        for (int64_t j = 0; j < rank; ++j) run(row[j * experts + number[i]], own[j]);
      }
    }
  });
}

// The same for a tensor b whose memory begins at `first`.
template <class Run>
void for_numbers_of(const at::Tensor& b, void* first, const at::Tensor& hit, int64_t experts,
                    void* pool, const Run& run) {
  const int64_t rows = b.size(0), rank = b.size(1) / experts;
  switch (b.element_size()) {
    case 2:
      return for_numbers<uint16_t>(first, hit, experts, pool, rows, rank, run);
    case 4:
      return for_numbers<uint32_t>(first, hit, experts, pool, rows, rank, run);
    default:
      return for_numbers<uint64_t>(first, hit, experts, pool, rows, rank, run);
  }
}

}  // namespace

at::Tensor experts_gather(const at::Tensor& b, const at::Tensor& hit, int64_t experts) {
  at::Tensor pool = at::empty({hit.numel(), b.size(0), b.size(1) / experts}, b.options());
  void* first = const_cast<void*>(b.const_data_ptr());
  for_numbers_of(b, first, hit, experts, pool.mutable_data_ptr(),
                 [](const auto& from, auto& to) { to = from; });
  return pool;
}

void experts_scatter(const at::Tensor& b, const at::Tensor& hit, int64_t experts,
                     const at::Tensor& pool) {
  void* from = const_cast<void*>(pool.const_data_ptr());
  for_numbers_of(b, b.mutable_data_ptr(), hit, experts, from,
                 [](auto& to, const auto& value) { to = value; });
}

}  // namespace lora_ext::cpu
