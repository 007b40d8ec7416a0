// What the library route, and the library's own products, should cost.
#pragma once
#include "plan/predict.h"

namespace lora_ext::plan {

// The library's product [m, n] = [m, k] [k, n], which reads what it adds to if it accumulates.
Launch library_product(const Card& card, const char* name, int64_t m, int64_t n, int64_t k,
                       bool accumulate = false);
Launches library_launches(const Card& card, const Problem& problem);

}  // namespace lora_ext::plan
