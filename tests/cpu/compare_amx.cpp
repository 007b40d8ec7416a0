// The passes on AMX tiles, which are software here, against those of portable vectors: the same
// integers, at every number of rows, columns and ranks around the tiles' edges, for rows that lie
// together and rows that do not. Prints the cases that differ; exit status 1 if there is one. With the
// argument "first" it ends there; a number n: only every n-th case.
//
// Integers up to 300 have two bfloat16 terms, up to 100 one. Of two factors no more than one has
// two: the product of both second terms is left out by design.
//
// The layer in one pass is compared with plain loops: tasks of two ranges of rows and columns, rows
// with one update, with several in a block of rows, and with none. T that it makes itself has the bits
// of shrink's.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/fused_product.h"
#include "cpu/skinny.h"

namespace {

using namespace lora_ext;
using namespace lora_ext::cpu;

std::mt19937 random_numbers(1);

int integer(int most) { return std::uniform_int_distribution<int>(-most, most)(random_numbers); }

std::vector<BFloat16> halves(int64_t count, int most) {
  std::vector<BFloat16> out(static_cast<size_t>(count));
  for (BFloat16& value : out) from_float(static_cast<float>(integer(most)), &value);
  return out;
}

std::vector<float> floats(int64_t count, int most) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = static_cast<float>(integer(most));
  return out;
}

// Memory that starts at a cache line, as torch's does.
struct Bytes {
  explicit Bytes(int64_t count) : memory(static_cast<size_t>(count + 64)) {}
  void* at() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64;
  }
  std::vector<uint8_t> memory;
};

struct Case {
  int64_t rows, cols, rank;
  bool float_adapter, scattered, drop, along_rank;
};

// What all passes of one table make of the same operands.
struct Results {
  std::vector<float> t, g;
  std::vector<BFloat16> y;
  std::vector<float> y_of_wgrad;
};

constexpr int64_t kExtraRows = 7;  // of P and Y, which a scattered case has between its own

struct Operands {
  Case c;
  std::vector<BFloat16> p, y, half_adapter;
  std::vector<float> float_adapter, t;
  std::vector<int32_t> rows;

  explicit Operands(const Case& wanted)
      : c(wanted),
        p(halves((wanted.rows + kExtraRows) * wanted.cols, 2)),
        y(halves((wanted.rows + kExtraRows) * wanted.cols, 8)),
        half_adapter(halves(wanted.rank * wanted.cols, 2)),
        float_adapter(floats(wanted.rank * wanted.cols, 300)),
        t(floats(wanted.rows * wanted.rank, wanted.float_adapter ? 100 : 300)) {
    for (int32_t m = 0; m < static_cast<int32_t>(c.rows + kExtraRows); ++m) rows.push_back(m);
    std::shuffle(rows.begin(), rows.end(), random_numbers);
    rows.resize(static_cast<size_t>(c.rows));
  }

  AdapterView view() const {
    const void* data = c.float_adapter ? static_cast<const void*>(float_adapter.data())
                                       : static_cast<const void*>(half_adapter.data());
    const Dtype dtype = c.float_adapter ? Dtype::kFloat32 : Dtype::kBFloat16;
    const int64_t along = c.along_rank ? 1 : c.cols, across = c.along_rank ? c.rank : 1;
    return {data, dtype, along, across, c.rank, c.cols};
  }
  RowIndex index() const { return {c.scattered ? rows.data() : nullptr}; }
  Dropout dropout() const {
    Dropout own;
    if (c.drop) own = {12345, 3, 5, philox::kKeepOne / 2};
    return own;
  }
};

// T in the layout of a pass.
struct Packed {
  Packed(const TLayout& layout, const Operands& o, bool u_is_half)
      : own(layout.bytes == nullptr ? 0 : layout.bytes(o.c.rows, o.c.rank, u_is_half)) {
    data = o.t.data();
    if (layout.bytes == nullptr) return;
    layout.pack(o.t.data(), o.c.rank, u_is_half, {0, o.c.rows}, own.at());
    data = own.at();
  }
  Bytes own;
  const void* data;
};

Results run(const SkinnyKernels& k, const Operands& o) {
  const Case& c = o.c;
  const AdapterView view = o.view();
  const bool is_half = !c.float_adapter;
  Results out;
  out.t.resize(static_cast<size_t>(c.rows * c.rank));
  Bytes shrink_panel(k.shrink_panel_bytes(c.rank, c.cols));
  Bytes shrink_work(k.shrink_bytes(c.rank)), wgrad_work(k.wgrad_bytes(c.rank));
  k.pack_shrink(view, shrink_panel.at());
  k.shrink({o.p.data(), Dtype::kBFloat16, c.cols, c.cols, c.rank, shrink_panel.at(), is_half, 2.0f,
            out.t.data(), o.dropout(), o.index(), shrink_work.at()},
           {0, c.rows});

  Bytes expand_panel(k.expand_panel_bytes(c.rank, c.cols));
  k.pack_expand(view, expand_panel.at());
  const Packed expand_t(k.expand_t, o, is_half), wgrad_t(k.wgrad_t, o, false);
  std::vector<BFloat16> y = o.y;
  const ExpandArgs expand{y.data(),      Dtype::kBFloat16,  c.cols,   c.cols,
                          c.rank,        expand_panel.at(), is_half,  0.5f,
                          expand_t.data, o.dropout(),       o.index()};
  k.expand(expand, {0, c.rows});
  out.y = y;

  std::vector<BFloat16> both = o.y;
  ExpandArgs beside = expand;
  beside.y = both.data();
  out.g.resize(static_cast<size_t>(c.rank * c.cols));
  // Drawn before in some cases.
  const int64_t words = round_up(c.cols, 64) / 32;
  std::vector<uint32_t> drawn(static_cast<size_t>(c.rows * words));
  MaskBits mask;
  if (c.drop && c.along_rank) {
    mask = {drawn.data(), words};
    k.dropout_bits(o.dropout(), o.index(), {0, c.rows}, {0, c.cols}, mask.words, mask.pitch);
  }
  const WgradArgs wgrad{
      o.p.data(),     Dtype::kBFloat16, c.cols, c.rows, c.rank,      wgrad_t.data, 1.0f,
      out.g.data(),   Dtype::kFloat32,  c.cols, 1,      o.dropout(), o.index(),    mask,
      wgrad_work.at()};
  k.wgrad(wgrad, beside, {0, c.cols});
  for (const BFloat16& value : both) out.y_of_wgrad.push_back(to_float(value));
  return out;
}

bool equal(const Results& a, const Results& b) {
  const auto bits = [](const std::vector<BFloat16>& values) {
    std::vector<float> out;
    for (const BFloat16& value : values) out.push_back(to_float(value));
    return out;
  };
  return a.t == b.t && a.g == b.g && bits(a.y) == bits(b.y) && a.y_of_wgrad == b.y_of_wgrad &&
         bits(a.y) == a.y_of_wgrad;
}

struct ProductCase {
  const FusedGemmKernels& kernels;
  int64_t rows, depth, cols, rank;
  bool float_adapter, scattered, drop, along_depth, has_bias, many;
};

// Tasks of two ranges of rows and columns.
void run_walk(const FusedProduct& product, int64_t rows) {
  const TileWalk& walk = *product.kernels.tiles;
  std::vector<ProductTask> tasks;
  const int64_t cut = std::min<int64_t>(product.cols, 64), half = std::min(rows, walk.block_rows);
  for (const Range own_cols : {Range{0, cut}, Range{cut, product.cols}}) {
    for (const Range own_rows : {Range{0, half}, Range{half, rows}}) {
      if (own_rows.begin < own_rows.end && own_cols.begin < own_cols.end) {
        tasks.push_back({product.parts.data(), own_rows, own_cols, 1});
      }
    }
  }
  const WalkTasks all{rows, product.cols, false};
  Bytes memory(walk.bytes(product, all));
  const WalkShare share{tasks.data(), tasks.data() + tasks.size(), static_cast<char*>(memory.at())};
  if (product.makes_t && walk.make_t != nullptr) {
    const ProductTask whole{product.parts.data(), {0, rows}, {}, 1};
    walk.make_t(product, {&whole, &whole + 1, share.memory});
  }
  walk.run(product, all, share);
}

bool same(const std::vector<BFloat16>& a, const std::vector<BFloat16>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), [](const BFloat16& one, const BFloat16& other) {
    return to_float(one) == to_float(other);
  });
}

// A mask that is drawn before a product, or none.
struct Drawn {
  Drawn(const Dropout& dropout, RowIndex index, int64_t rows, int64_t cols)
      : words(static_cast<size_t>(rows * ((cols + 31) / 32))) {
    if (!dropout.enabled()) return;
    bits = {words.data(), (cols + 31) / 32};
    portable_kernels()->dropout_bits(dropout, index, {0, rows}, {0, cols}, bits.words, bits.pitch);
  }
  std::vector<uint32_t> words;
  MaskBits bits;
};

// T by the walk, of a masked P or for a masked Y, beside T by shrink.
bool own_t_is_right(const ProductCase& c) {
  const Operands x({c.rows, c.depth, c.rank, c.float_adapter, false, c.drop, c.along_depth});
  const Operands u({c.rows, c.cols, c.rank, c.float_adapter, false, c.drop, false});
  const auto q = halves(c.depth * c.cols, 2);
  const Dropout of_p = c.has_bias ? x.dropout() : Dropout{};
  const Dropout of_y = c.has_bias ? Dropout{} : u.dropout();
  const Drawn mask_of_p(of_p, {}, c.rows, c.depth), mask_of_y(of_y, {}, c.rows, c.cols);
  const std::vector<BasePart> parts{{{0, c.rows}, q.data(), nullptr}};
  std::vector<float> t(static_cast<size_t>(c.rows * c.rank)), own(t.size());
  Bytes panel(amx_kernels()->shrink_panel_bytes(c.rank, c.depth));
  Bytes work(amx_kernels()->shrink_bytes(c.rank));
  amx_kernels()->pack_shrink(x.view(), panel.at());
  amx_kernels()->shrink({x.p.data(),
                         Dtype::kBFloat16,
                         c.depth,
                         c.depth,
                         c.rank,
                         panel.at(),
                         !c.float_adapter,
                         2.0f,
                         t.data(),
                         of_p,
                         {},
                         work.at()},
                        {0, c.rows});
  std::vector<BFloat16> y(u.y), y_of_own(u.y);
  for (const bool is_own : {false, true}) {
    TileArgs tile{(is_own ? y_of_own : y).data(), Dtype::kBFloat16, c.cols};
    tile.dropout = of_y, tile.mask = mask_of_y.bits;
    const std::vector<RowUpdate> updates{
        {{0, c.rows}, (is_own ? own : t).data(), u.view(), 0.5f, x.view(), 2.0f}};
    run_walk({c.kernels, Dtype::kBFloat16, x.p.data(), Dtype::kBFloat16, c.depth, RowIndex{},
              c.depth, c.cols, MatrixView{nullptr, Dtype::kBFloat16, c.cols, 1}, tile, parts,
              updates, is_own, is_own ? mask_of_p.bits : MaskBits{}},
             c.rows);
  }
  return same(y, y_of_own) && t == own;
}

bool product_is_right(const ProductCase& c) {
  const Operands o({c.rows, c.cols, c.rank, c.float_adapter, c.scattered, c.drop, false});
  const int64_t all_rows = c.rows + kExtraRows, pitch = c.depth + 3;
  const auto p = halves(all_rows * pitch, 2), q = halves(c.depth * c.cols, 2),
             bias = halves(c.cols, 9);
  std::vector<BFloat16> y(o.y);
  const MatrixView view{q.data(), Dtype::kBFloat16, c.along_depth ? 1 : c.cols,
                        c.along_depth ? c.depth : 1};
  const Drawn mask(o.dropout(), o.index(), c.rows, c.cols);
  TileArgs tile{y.data(), Dtype::kBFloat16, c.cols,    nullptr,
                nullptr,  o.dropout(),      o.index(), mask.bits};
  const std::vector<BasePart> parts{{{0, c.rows}, q.data(), c.has_bias ? bias.data() : nullptr}};
  std::vector<float> t(o.t);
  std::vector<RowUpdate> updates;
  const auto update = [&](int64_t begin, int64_t end, float scale) {
    if (begin < end)
      updates.push_back({{begin, end}, t.data() + begin * c.rank, o.view(), scale, {}, 0.0f});
  };
  if (c.many) {
    update(0, c.rows / 5, 0.5f), update(c.rows / 5, c.rows / 3, 2.0f);
    update(c.rows / 2, c.rows - 1, 1.0f);
  } else {
    update(0, c.rows, 0.5f);
  }
  const FusedProduct product{c.kernels, Dtype::kBFloat16,
                             p.data(),  Dtype::kBFloat16,
                             pitch,     o.index(),
                             c.depth,   c.cols,
                             view,      tile,
                             parts,     updates};
  run_walk(product, c.rows);

  const AdapterView u = o.view();
  const auto u_at = [&](int64_t j, int64_t col) {
    const int64_t at = j * u.rank_pitch + col * u.col_pitch;
    return c.float_adapter ? o.float_adapter[at] : to_float(o.half_adapter[at]);
  };
  std::vector<BFloat16> wanted(o.y);
  for (int64_t m = 0; m < c.rows; ++m) {
    const int64_t row = o.index()[m];
    for (int64_t col = 0; col < c.cols; ++col) {
      float sum = c.has_bias ? to_float(bias[col]) : 0.0f;
      for (int64_t d = 0; d < c.depth; ++d) {
        sum +=
            to_float(p[row * pitch + d]) * to_float(q[d * view.depth_pitch + col * view.col_pitch]);
      }
      const bool is_kept =
          mask.bits.words == nullptr || (*mask.bits.at(m, col).words >> (col % 32) & 1u) != 0;
      for (const RowUpdate& each : updates) {
        for (int64_t j = 0; is_kept && each.rows.begin <= m && m < each.rows.end && j < c.rank;
             ++j) {
          sum += each.scale * o.t[m * c.rank + j] * u_at(j, col);
        }
      }
      from_float(sum, &wanted[row * c.cols + col]);
    }
  }
  return same(y, wanted);
}

void compare_products(const FusedGemmKernels& kernels, int& cases, int& wrong, int every,
                      bool ends_early) {
  for (const int64_t rows : {1, 33, 70}) {
    for (const int64_t depth : {1, 33, 700, 1600}) {
      for (const int64_t cols : {1, 33, 130}) {
        for (int flags = 0; flags < 64; ++flags) {
          const auto is = [&](int flag) { return (flags >> flag & 1) != 0; };
          const ProductCase c{kernels, rows,  depth, cols,  is(0) ? 17 : 5, is(1),
                              is(2),   is(3), is(4), is(5), is(0) != is(3)};
          if (++cases % every != 0) continue;
          const bool has_own_t = !c.many && !c.scattered;
          if (product_is_right(c) && (!has_own_t || own_t_is_right(c))) continue;
          ++wrong;
          std::printf("differs: product of %ld rows, depth %ld, %ld columns, flags %d\n", rows,
                      depth, cols, flags);
          if (ends_early) return;
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool ends_early = count > 1 && std::string(arguments[1]) == "first";
  const int every = count > 1 && !ends_early ? std::stoi(arguments[1]) : 1;
  if (amx_kernels() == nullptr) {
    std::printf("this processor lacks AVX512_BF16\n");
    return 2;
  }
  int wrong = 0, cases = 0;
  for (const int64_t rows : {1, 15, 32, 33, 70, 129, 200}) {
    for (const int64_t cols : {1, 31, 32, 64, 70, 520}) {
      for (const int64_t rank : {1, 15, 16, 17, 33}) {
        for (int flags = 0; flags < 16; ++flags) {
          const Case c{rows,
                       cols,
                       rank,
                       (flags & 1) != 0,
                       (flags & 2) != 0,
                       (flags & 4) != 0,
                       (flags & 8) != 0};
          if (++cases % every != 0) continue;
          const Operands operands(c);
          if (equal(run(*amx_kernels(), operands), run(*portable_kernels(), operands))) continue;
          ++wrong;
          std::printf("differs: %ld rows, %ld columns, rank %ld%s%s%s%s\n", rows, cols, rank,
                      c.float_adapter ? ", float adapter" : "", c.scattered ? ", scattered" : "",
                      c.drop ? ", dropout" : "", c.along_rank ? ", along the rank" : "");
          if (ends_early) return 1;
        }
      }
    }
  }
  compare_products(*amx_fused_gemm(), cases, wrong, every, ends_early);
  compare_products(*avx512_bf16_fused_gemm(), cases, wrong, every, ends_early);
  std::printf("%d cases, %d differ\n", cases, wrong);
  return wrong == 0 ? 0 : 1;
}
