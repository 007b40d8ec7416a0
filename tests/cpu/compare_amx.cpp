// The passes on AMX tiles, which are software here, against those of portable vectors: the same
// integers, at every number of rows, columns and ranks around the tiles' edges, for rows that lie
// together and rows that do not. Prints the cases that differ; exit status 1 if there is one.
//
// Integers up to 300 have two bfloat16 terms, up to 100 one. Of two factors no more than one has
// two: the product of both second terms is left out by design.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

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
  k.pack_shrink(view, shrink_panel.at());
  k.shrink({o.p.data(), Dtype::kBFloat16, c.cols, c.cols, c.rank, shrink_panel.at(), is_half, 2.0f,
            out.t.data(), o.dropout(), o.index()},
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
  const WgradArgs wgrad{o.p.data(), Dtype::kBFloat16, c.cols,          c.rows, c.rank, wgrad_t.data,
                        1.0f,       out.g.data(),     Dtype::kFloat32, c.cols, 1,      o.dropout(),
                        o.index()};
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

}  // namespace

int main() {
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
          const Operands operands(c);
          ++cases;
          if (equal(run(*amx_kernels(), operands), run(*portable_kernels(), operands))) continue;
          ++wrong;
          std::printf("differs: %ld rows, %ld columns, rank %ld%s%s%s%s\n", rows, cols, rank,
                      c.float_adapter ? ", float adapter" : "", c.scattered ? ", scattered" : "",
                      c.drop ? ", dropout" : "", c.along_rank ? ", along the rank" : "");
        }
      }
    }
  }
  std::printf("%d cases, %d differ\n", cases, wrong);
  return wrong == 0 ? 0 : 1;
}
