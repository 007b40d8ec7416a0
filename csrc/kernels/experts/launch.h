// Launches the kernels around the products of a mixture's experts: enqueue<T>(run, params), where
// run(kernel, grid, threads, shared bytes, params) launches one.
#pragma once
#include <algorithm>

#include "common/bounds.h"
#include "kernels/experts/factors.h"
#include "kernels/experts/routes.h"
#include "kernels/experts/slots.h"

namespace lora_ext::kernel {

template <class Index, class Launch>
void sort_by_expert(Launch& run, const ExpertsSortParams& p) {
  const auto launch = [&](void (*kernel)(ExpertsSortParams), unsigned blocks) {
    run(kernel, dim3(blocks), p.kThreads, p.kSharedBytes, p);
  };
  const auto chunks = static_cast<unsigned>((p.rows.m + p.kChunk - 1) / p.kChunk);
  if (chunks == 1) return launch(lora_experts_routes<Index>, 1);
  launch(lora_experts_count<Index>, chunks);
  launch(lora_experts_begin<Index>, 1);
  launch(lora_experts_place<Index>, chunks);
}

template <class T, class Launch>
void enqueue(Launch& run, const ExpertsRoutesParams& routes) {
  ExpertsSortParams p{};
  p.rows.m = routes.rows, p.rows.groups = routes.experts;
  p.rows.ends = routes.offs, p.rows.max_rank = static_cast<int>(kMaxRank);
  p.tables = routes.tables, p.tables.counts = routes.counts, p.routes = routes;
  p.groups_per_weight = routes.adapters;
  routes.is_long ? sort_by_expert<int64_t>(run, p) : sort_by_expert<int>(run, p);
}

template <class T, class Launch>
void enqueue(Launch& run, const ExpertsFactorsParams& p) {
  using Factors = ExpertsFactors<T>;
  const auto parts_of = Factors::parts_of;
  const int64_t of_a = int64_t{p.experts} * p.ranks * parts_of(p.in, Factors::kColumns);
  const int64_t parts = p.x != nullptr ? int64_t{p.rows} * p.ranks : of_a;
  const int64_t tiles = int64_t{parts_of(p.experts, Factors::kExperts)} *
                        parts_of(p.ranks, Factors::kRanks) * parts_of(p.out, Factors::kRows);
  const int64_t blocks = std::max((parts + Factors::kWarps - 1) / Factors::kWarps, tiles);
  run(lora_experts_factors<T>, dim3(static_cast<unsigned>(blocks), 2), Factors::kThreads,
      Factors::kSharedBytes, p);
}

template <class T, class Launch>
void enqueue(Launch& run, const ExpertsSumParams& p) {
  constexpr int kColumns = kExpertsThreads * RowChunk<T>::kElements;
  const auto parts = static_cast<unsigned>((p.n + int64_t{kColumns} - 1) / kColumns);
  run(lora_experts_sum<T>, dim3(static_cast<unsigned>(p.tokens), parts), kExpertsThreads, 0, p);
}

template <class T, class Launch>
void enqueue(Launch& run, const ExpertsDotParams& p) {
  constexpr int kRows = kExpertsThreads / 32;
  const auto blocks = static_cast<unsigned>((p.rows + int64_t{kRows} - 1) / kRows);
  run(lora_experts_dot<T>, dim3(blocks), kExpertsThreads, 0, p);
}

}  // namespace lora_ext::kernel
