// The launches of the library route, as csrc/op/library/library_route.cpp makes them.
#include <algorithm>

#include "common/bounds.h"
#include "kernels/plan/predict.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {

// Tiles of 128 x 128, of 64 where a matrix has no more rows or columns; k is split where there are
// fewer tiles than SMs, but not into parts of less than 512.
Launch library_product(const Card& card, Dtype dtype, const char* name, int64_t m, int64_t n,
                       int64_t k, bool accumulate) {
  const int64_t rows = m > 64 ? 128 : 64, columns = n > 64 ? 128 : 64;
  const int64_t tiles = blocks_of(m, rows) * blocks_of(n, columns);
  const int64_t splits = std::clamp<int64_t>(card.sms / tiles, 1, blocks_of(k, 512));
  const double outputs = (accumulate ? 2 : 1) * area(m, n);
  const double bytes =
      static_cast<double>(element_size(dtype)) * (area(m, k) + area(n, k) + outputs);
  const double flop = 2 * area(tiles * rows, columns) * static_cast<double>(k);
  return {name, bytes, flop, 1, tiles * splits, 1, kHostLibraryUs};
}

// With adapters of x's dtype the expand comes first, and the base product accumulates onto it. With
// float32 adapters there are passes over x and y in float32, a block of rows at a time, counted
// here together and with all gradients.
void add_library_launches(Launches& launches, const Card& card, const Problem& p) {
  const double e = element_bytes(p), x = area(p.m, p.k), y = area(p.m, p.n);
  const double s = (e + kFloat) * area(p.m, p.rank);
  const auto product = [&](const char* name, int64_t m, int64_t n, int64_t k, bool onto = false) {
    launches.push_back(library_product(card, p.dtype, name, m, n, k, onto));
  };
  const auto passes = [&](const char* name, double bytes, int64_t count = 1) {
    launches.push_back({name, bytes, 0, 1, 1, count, kHostLibraryUs * static_cast<double>(count)});
  };
  const bool base = p.has_product() && !p.given_base, drop = p.dropout;
  if (p.float_adapters && p.half_dtype()) {
    const int64_t rows = std::max<int64_t>(16, kWideBlockBytes / (4 * std::max(p.k, p.n)));
    const int64_t blocks = blocks_of(p.m, rows), masks = drop ? 1 : 0;
    if (base) product(p.backward ? "dX" : "base", p.m, p.columns(), p.depth());
    if (!base) passes("y", 2 * e * (p.backward ? x : y));
    if (p.backward) {
      passes("float32", (5 * e + (4 + 4 * masks) * kFloat) * x + (e + 5 * kFloat) * y,
             (9 + 2 * masks) * blocks);
    } else {
      passes("float32", (e + (2 + 2 * masks) * kFloat) * x + (2 * e + 6 * kFloat) * y,
             (6 + masks) * blocks);
    }
  } else if (!p.backward) {
    if (drop) passes("dropout", 2 * e * x);
    product("x A^T", p.m, p.rank, p.k);
    passes("S to float32", s);
    product("S B^T", p.m, p.n, p.rank, p.given_base);
    if (base) product("base", p.m, p.n, p.k, true);
  } else {
    if (p.need_dlora_b) passes("S to half", s), product("dB", p.n, p.rank, p.m);
    if (base) product("dX", p.m, p.k, p.n);
    if (p.need_ds()) product("dS", p.m, p.rank, p.n);
    if (p.need_dlora_a && drop) passes("dropout of x", 2 * e * x);
    if (p.need_dlora_a) product("dA", p.rank, p.k, p.m);
    if (p.need_dx) product("dS A", p.m, p.k, p.rank, base && !drop);
    if (p.need_dx && drop) passes("dropout of dS A", 2 * e * x);
    if (base && drop) passes("plus", 3 * e * x);
  }
}

}  // namespace lora_ext::plan
