#include "common/rows.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>

namespace lora_ext {
namespace {

at::Tensor on_host(const at::Tensor& numbers) {
  return numbers.reshape({-1}).to(at::kCPU).contiguous();
}

// The ranks of the adapters.
std::vector<int64_t> ranks_of(const char* op, const Update& update) {
  const int64_t adapters = update.adapters(), most = update.rank();
  std::vector<int64_t> ranks(static_cast<size_t>(adapters), most);
  if (!update.is_pool()) {
    for (int64_t g = 0; g < adapters; ++g) ranks[g] = update.lora_a[g].size(0);
  } else if (update.grouping->ranks) {
    const at::Tensor numbers = on_host(*update.grouping->ranks);
    const int32_t* data = numbers.const_data_ptr<int32_t>();
    for (int64_t g = 0; g < adapters; ++g) {
      TORCH_CHECK_INDEX(data[g] >= 0 && data[g] <= most, "lora_ext.", op,
                        ": expected ranks from 0 to ", most, ", but got ", data[g], " at ", g);
      ranks[g] = data[g];
    }
  }
  return ranks;
}

// begins[g]: the first of the sorted rows that has adapter g; the last element is the end.
std::vector<int64_t> sort_by_index(const char* op, const int32_t* index, int64_t rows,
                                   int64_t adapters, std::vector<int32_t>& order) {
  std::vector<int64_t> begins(static_cast<size_t>(adapters) + 1, 0);
  for (int64_t m = 0; m < rows; ++m) {
    TORCH_CHECK_INDEX(index[m] >= -1 && index[m] < adapters, "lora_ext.", op,
                      ": expected an index from -1 (no adapter) to ", adapters - 1, ", but got ",
                      index[m], " for row ", m);
    if (index[m] >= 0) ++begins[static_cast<size_t>(index[m]) + 1];
  }
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  order.resize(static_cast<size_t>(begins.back()));
  std::vector<int64_t> next = begins;
  for (int64_t m = 0; m < rows; ++m) {
    if (index[m] >= 0) order[next[index[m]]++] = static_cast<int32_t>(m);
  }
  return begins;
}

std::vector<int64_t> sorted_by_offs(const char* op, const int32_t* offs, int64_t rows,
                                    int64_t adapters, std::vector<int32_t>& order) {
  std::vector<int64_t> begins(static_cast<size_t>(adapters) + 1, 0);
  for (int64_t g = 0; g < adapters; ++g) {
    TORCH_CHECK_INDEX(offs[g] >= begins[g] && offs[g] <= rows, "lora_ext.", op,
                      ": expected offs that ascend from 0 to at most the ", rows, " rows, but got ",
                      offs[g], " at ", g);
    begins[g + 1] = offs[g];
  }
  order.resize(static_cast<size_t>(begins.back()));
  std::iota(order.begin(), order.end(), 0);
  return begins;
}

}  // namespace

Segments segments_of(const char* op, const Update& update, int64_t rows) {
  const int64_t adapters = update.adapters();
  Segments out;
  const at::Tensor numbers =
      on_host(update.grouping->index ? *update.grouping->index : *update.grouping->offs);
  const int32_t* data = numbers.const_data_ptr<int32_t>();
  const std::vector<int64_t> begins = update.grouping->index
                                          ? sort_by_index(op, data, rows, adapters, out.order)
                                          : sorted_by_offs(op, data, rows, adapters, out.order);
  const std::vector<int64_t> ranks = ranks_of(op, update);
  for (int64_t g = 0; g < adapters; ++g) {
    const int64_t count = begins[g + 1] - begins[g];
    if (count > 0 && ranks[g] > 0) out.list.push_back({g, begins[g], count, ranks[g]});
  }
  return out;
}

}  // namespace lora_ext
