#include "op/launch/grouped_operands.h"

#include <ATen/ops/full.h>

namespace lora_ext::kernel_launch {
namespace {

// The matrices or pools with unit stride within a row: the tensors themselves, or copies.
Factors with_rows(at::TensorList factors) {
  Factors out;
  out.reserve(factors.size());
  for (const at::Tensor& factor : factors) {
    out.push_back(factor.stride(-1) == 1 ? factor : factor.contiguous());
  }
  return out;
}

// If ranks is not given, every slot of a pool has the full rank.
at::Tensor ranks_of(const Update& update) {
  const Grouping& many = *update.grouping;
  if (many.ranks) return many.ranks->contiguous();
  return at::full({update.adapters()}, update.rank(), many.scaling.options().dtype(at::kInt));
}

const int32_t* numbers_at(const at::Tensor& numbers) {
  return numbers.defined() ? numbers.const_data_ptr<int32_t>() : nullptr;
}

}  // namespace

GroupedMatrices::GroupedMatrices(const Update& update, at::TensorList a, at::TensorList b) {
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  const auto pitch = [](const at::Tensor& t) { return t.defined() ? t.stride(-2) : 0; };
  if (update.is_pool()) {
    kernel::LoraGroupedFactors& pool = matrices_.pool;
    pool.a = data(a[0]), pool.b = data(b[0]);
    pool.a_stride = a[0].defined() ? a[0].stride(0) : 0;
    pool.b_stride = b[0].defined() ? b[0].stride(0) : 0;
    pool.a_pitch = pitch(a[0]), pool.b_pitch = pitch(b[0]);
    ranks_ = ranks_of(update);
    pool.ranks = ranks_.const_data_ptr<int32_t>();
    return;
  }
  entries_.reserve(a.size());
  for (size_t g = 0; g < a.size(); ++g) {
    entries_.push_back({data(a[g]), data(b[g]), pitch(a[g]), pitch(b[g]),
                        static_cast<int>(update.lora_a[g].size(0))});
  }
  matrices_.list = entries_.data();
}

GroupedOperands::GroupedOperands(const Update& update)
    : adapters_(update.adapters()),
      rank_(update.rank()),
      scaling_(update.grouping->scaling.contiguous()),
      a_(with_rows(update.lora_a)),
      b_(with_rows(update.lora_b)),
      factors_(update, a_, b_) {
  const Grouping& many = *update.grouping;
  if (many.index) index_ = many.index->reshape({-1}).contiguous();
  if (many.offs) offs_ = many.offs->contiguous();
}

void GroupedOperands::set(kernel::LoraGroupedOperands& operands, int64_t rows) const {
  operands.rows.index = numbers_at(index_), operands.rows.ends = numbers_at(offs_);
  operands.rows.m = static_cast<int>(rows), operands.rows.groups = static_cast<int>(adapters_);
  operands.rows.most_rank = static_cast<int>(rank_);
  operands.scaling = scaling_.const_data_ptr<float>();
  operands.factors = factors_.matrices();
}

}  // namespace lora_ext::kernel_launch
