// Predicted cost of the library route, and of the library's own products.
#pragma once
#include "plan/predict.h"

namespace lora_ext::plan {

// The library's product [m, n] = [m, k] [k, n]; if it accumulates, it also reads what it adds to.
Launch library_product(const Card& card, const char* name, int64_t m, int64_t n, int64_t k,
                       bool accumulate = false);
Launches library_launches(const Card& card, const Problem& problem);

}  // namespace lora_ext::plan
