// The launches of the library route, as csrc/op/library/library_route.cpp makes them.
#include <algorithm>

#include "common/bounds.h"
#include "kernels/plan/predict.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

constexpr double kFloat = 4;  // bytes

// Tiles that the library chooses from, the smaller ones at a lower rate.
struct LibraryTile {
  int64_t rows, columns;
  double share;
};
constexpr LibraryTile kLibraryTiles[] = {
    {128, 256, 1.0}, {128, 128, 0.9}, {128, 64, 0.75}, {64, 64, 0.55}};
constexpr int64_t kLibrarySplit = 512;  // least depth of a split of k

// With adapters of x's dtype: first the expand, then the base product, accumulated onto it.
Launches library_forward(const Card& card, const Problem& p) {
  Launches launches;
  if (p.dropout) launches.add("dropout", 2 * element_bytes(p) * area(p.m, p.k));
  launches.add(library_product(card, p.dtype, "x A^T", p.m, p.rank, p.k));
  launches.add("S to float32", (element_bytes(p) + kFloat) * area(p.m, p.rank));
  launches.add(library_product(card, p.dtype, "S B^T", p.m, p.n, p.rank, p.given_base));
  if (!p.given_base) launches.add(library_product(card, p.dtype, "base", p.m, p.n, p.k, true));
  return launches;
}

// With float32 adapters: passes in float32 over X and over Y, a block of rows at a time.
class WidePasses {
 public:
  WidePasses(const Problem& p, Launches& launches)
      : launches_(launches),
        blocks_(blocks_of(p.m, std::max<int64_t>(16, kWideBlockBytes / (4 * std::max(p.k, p.n))))) {
  }
  void add(const char* name, double bytes) { launches_.add(name, bytes, 0.0, blocks_); }

 private:
  Launches& launches_;
  int64_t blocks_;
};

Launches library_forward_wide(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k), y = area(p.m, p.n);
  Launches launches;
  if (p.given_base) {
    launches.add("copy of y", 2 * element_bytes(p) * y);
  } else {
    launches.add(library_product(card, p.dtype, "base", p.m, p.n, p.k));
  }
  WidePasses passes(p, launches);
  passes.add("x to float32", (element_bytes(p) + kFloat) * x);
  if (p.dropout) passes.add("dropout of x", 2 * kFloat * x);
  passes.add("x A^T", kFloat * x);
  passes.add("S B^T", kFloat * y);
  passes.add("times s", 2 * kFloat * y);
  passes.add("plus", (element_bytes(p) + 2 * kFloat) * y);
  passes.add("round", (kFloat + element_bytes(p)) * y);
  return launches;
}

Launches library_backward(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k);
  Launches launches;
  if (p.need_dlora_b) {
    launches.add("S to half", (element_bytes(p) + kFloat) * area(p.m, p.rank));
    launches.add(library_product(card, p.dtype, "dB", p.n, p.rank, p.m));
  }
  if (p.need_dx && !p.given_base) launches.add(library_product(card, p.dtype, "dX", p.m, p.k, p.n));
  if (!p.need_dx && !p.need_dlora_a) return launches;
  launches.add(library_product(card, p.dtype, "dS", p.m, p.rank, p.n));
  if (p.need_dlora_a) {
    if (p.dropout) launches.add("dropout of x", 2 * element_bytes(p) * x);
    launches.add(library_product(card, p.dtype, "dA", p.rank, p.k, p.m));
  }
  if (!p.need_dx) return launches;
  const bool plus = p.dropout && !p.given_base;
  launches.add(
      library_product(card, p.dtype, "dS A", p.m, p.k, p.rank, !p.dropout && !p.given_base));
  if (p.dropout) launches.add("dropout of dS A", 2 * element_bytes(p) * x);
  if (plus) launches.add("plus", 3 * element_bytes(p) * x);
  return launches;
}

Launches library_backward_wide(const Card& card, const Problem& p) {
  const double x = area(p.m, p.k), y = area(p.m, p.n);
  Launches launches;
  if (p.need_dx && p.given_base) launches.add("zeros", element_bytes(p) * x);
  if (p.need_dx && !p.given_base) launches.add(library_product(card, p.dtype, "dX", p.m, p.k, p.n));
  WidePasses passes(p, launches);
  passes.add("dY to float32", (element_bytes(p) + kFloat) * y);
  passes.add("times s", 2 * kFloat * y);
  if (p.need_dlora_b) passes.add("dB", kFloat * y);
  if (!p.need_dx && !p.need_dlora_a) return launches;
  passes.add("dS", kFloat * y);
  if (p.need_dlora_a) {
    passes.add("x to float32", (element_bytes(p) + kFloat) * x);
    if (p.dropout) passes.add("dropout of x", 2 * kFloat * x);
    passes.add("dA", kFloat * x);
  }
  if (!p.need_dx) return launches;
  passes.add("dS A", kFloat * x);
  if (p.dropout) passes.add("dropout of dS A", 2 * kFloat * x);
  passes.add("round", (kFloat + element_bytes(p)) * x);
  passes.add("plus", 3 * element_bytes(p) * x);
  return launches;
}

}  // namespace

Launch library_product(const Card& card, Dtype dtype, const char* name, int64_t m, int64_t n,
                       int64_t k, bool accumulate) {
  double least = 0.0;
  for (const LibraryTile& tile : kLibraryTiles) {
    const int64_t tiles = blocks_of(m, tile.rows) * blocks_of(n, tile.columns);
    const int64_t waves = blocks_of(tiles, card.sms);
    const int64_t splits =
        std::max<int64_t>(1, std::min(card.sms / tiles, blocks_of(k, kLibrarySplit)));
    const double flop = 2.0 * static_cast<double>(waves * card.sms) *
                        area(tile.rows, tile.columns) * static_cast<double>(k) /
                        static_cast<double>(splits) / tile.share;
    if (least == 0.0 || flop < least) least = flop;
  }
  const double passes = accumulate ? 2 : 1;
  const auto element = static_cast<double>(element_size(dtype));
  return {name, element * (area(m, k) + area(n, k) + passes * area(m, n)), least};
}

Launches library_launches(const Card& card, const Problem& p) {
  if (p.float_adapters && p.half_dtype())
    return p.backward ? library_backward_wide(card, p) : library_forward_wide(card, p);
  return p.backward ? library_backward(card, p) : library_forward(card, p);
}

}  // namespace lora_ext::plan
