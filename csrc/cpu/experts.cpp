// First the products with W and A, in pieces of some columns of one expert; then y, where a thread
// takes a range of columns for all experts: one column of B for all experts is some KB of
// contiguous memory, although each expert has only one number in some hundred bytes of it. No sum
// is split, so results do not depend on the number of threads. A weight of 4 bits is dequantised in
// strips of some rows, each right before its product: the values stay in a core's cache.
#include "cpu/experts.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/dequantize.h"
#include "cpu/dispatch.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPieceColumns = 256, kMaxRows = 4;
constexpr int64_t kLine = 64;          // bytes
constexpr int64_t kPrefetched = 2048;  // bytes ahead
// Reading a factor takes as long as the products of this number of rows.
constexpr int64_t kFactorRows = 3;
// Dequantising a weight takes as long as the products of this number of rows.
constexpr int64_t kFourBitRows = 2;
constexpr int64_t kStrip = 1 << 14;  // dequantised values at a time: 32 KB

// The product of some rows with some ranks of a factor, or with some columns of a weight.
struct Product {
  Range rows;        // of one expert; at most kMaxRows
  AdapterView view;  // at most kPieceColumns ranks
  float* to;
  int64_t pitch;
  int64_t work;
  int64_t first_code = -1;  // of a weight of 4 bits, whose view has no data
};

class FewRows {
 public:
  explicit FewRows(const ExpertsArgs& args)
      : args_(args), kernels_(*kernels_for_few_rows()), where_(args.experts.size()) {
    const int64_t* token = args.token ? args.token->const_data_ptr<int64_t>() : nullptr;
    for (size_t m = 0; m < where_.size(); ++m) {
      where_[m] = static_cast<int32_t>(token == nullptr ? static_cast<int64_t>(m) : token[m]);
    }
  }

  Forward run() {
    const int64_t rows = args_.rows(), columns = args_.weight.size(1);
    const auto floats = args_.x.options().dtype(at::kFloat);
    sums_ = at::empty({rows, columns}, floats);
    s_ = at::zeros({rows, args_.rank()}, floats);  // a row may have a smaller rank, or no adapter
    y_ = at::empty({rows, columns}, args_.x.options());
    if (args_.bias) bias_ = args_.bias->to(at::kFloat);
    multiply();
    const Dtype dtype = dtype_of(y_.scalar_type());
    const int64_t work = (rows + kFactorRows) * columns * (args_.rank() + 1);
    const int64_t threads = std::min(threads_for(work), columns);
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const Range range{first * columns / threads, last * columns / threads};
      dtype == Dtype::kBFloat16 ? finish<BFloat16>(range) : finish<Float16>(range);
    });
    return {y_, s_};
  }

 private:
  void multiply() {
    std::vector<Product> pieces;
    const int64_t rows = args_.rows();
    for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
      const int64_t expert = args_.experts[begin];
      while (end < rows && end - begin < kMaxRows && args_.experts[end] == expert) ++end;
      const Range own{begin, end};
      add_weight(pieces, own, expert);
      args_.adapters ? add_own(pieces, own) : add_all(pieces, own);
    }
    int64_t work = 0;
    for (const Product& piece : pieces) work += piece.work;
    run_pieces(pieces, threads_for(work), [&](int64_t, const Product& piece) { multiply(piece); });
  }

  // The products with A of all adapters, for rows of one expert.
  void add_all(std::vector<Product>& pieces, Range rows) {
    int64_t column = 0;
    for (size_t i = 0; i < args_.lora_a.size(); column += args_.rank_of(i++)) {
      add(pieces, rows, a_of(i, args_.experts[rows.begin]), s_, column);
    }
  }

  // The products with A of each row's own adapter.
  void add_own(std::vector<Product>& pieces, Range rows) {
    const std::vector<int64_t>& adapters = *args_.adapters;
    for (int64_t begin = rows.begin, end = begin; begin < rows.end; begin = end) {
      const int64_t adapter = adapters[begin];
      while (end < rows.end && adapters[end] == adapter) ++end;
      if (adapter >= 0) add(pieces, {begin, end}, a_of(adapter, args_.experts[begin]), s_, 0);
    }
  }

  AdapterView a_of(size_t i, int64_t expert) const {
    const int64_t rank = args_.rank_of(i);
    const AdapterView all = view_of(args_.lora_a[i], 0);
    return part_of(all, {expert * rank, (expert + 1) * rank}, {0, all.cols});
  }

  void add_weight(std::vector<Product>& pieces, Range rows, int64_t expert) const {
    if (!args_.blocks) {
      return add(pieces, rows, view_of(args_.weight.select(0, expert), 0), sums_, 0);
    }
    const int64_t columns = args_.weight.size(1), in = args_.in_features();
    const Dtype dtype = dtype_of(args_.x.scalar_type());
    float* to = sums_.mutable_data_ptr<float>() + rows.begin * columns;
    const int64_t count = rows.end - rows.begin + kFactorRows + kFourBitRows;
    for (int64_t begin = 0; begin < columns; begin += kPieceColumns) {
      const int64_t some = std::min(kPieceColumns, columns - begin);
      pieces.push_back({rows, AdapterView{nullptr, dtype, in, 1, some, in}, to + begin, columns,
                        count * some * in, (expert * columns + begin) * in});
    }
  }

  static void add(std::vector<Product>& pieces, Range rows, const AdapterView& view,
                  const at::Tensor& out, int64_t column) {
    float* to = out.mutable_data_ptr<float>() + rows.begin * out.size(1) + column;
    const int64_t count = rows.end - rows.begin;
    for (int64_t begin = 0; begin < view.rank; begin += kPieceColumns) {
      const int64_t end = std::min(begin + kPieceColumns, view.rank);
      pieces.push_back({rows, part_of(view, {begin, end}, {0, view.cols}), to + begin, out.size(1),
                        (count + kFactorRows) * (end - begin) * view.cols});
    }
  }

  void multiply(const Product& piece) const {
    if (piece.first_code < 0) return multiply_values(piece);
    const int64_t in = piece.view.cols;
    const int64_t step = std::max<int64_t>(1, kStrip / std::max<int64_t>(1, in));
    std::vector<uint16_t> values(step * in);
    std::vector<float> scales(step * in / args_.blocks->block);
    for (int64_t begin = 0; begin < piece.view.rank; begin += step) {
      const int64_t end = std::min(begin + step, piece.view.rank);
      Product strip = piece;
      strip.view.data = values.data(), strip.view.rank = end - begin, strip.to += begin;
      dequantize(piece.first_code + begin * in, (end - begin) * in, scales.data(), values.data(),
                 piece.view.dtype);
      multiply_values(strip);
    }
  }

  void dequantize(int64_t first, int64_t count, float* scales, void* values, Dtype dtype) const {
    const FourBitBlocks& blocks = *args_.blocks;
    const int64_t block = first / blocks.block, some = count / blocks.block;
    FourBitArgs args{};
    args.packed = args_.weight.const_data_ptr<uint8_t>() + first / 2;
    args.low_first = blocks.low_first, args.table = blocks.table->const_data_ptr<float>();
    args.count = count, args.block = blocks.block, args.out = values, args.dtype = dtype;
    if (blocks.is_nested()) {
      const NestedScales nested{blocks.scale.const_data_ptr<uint8_t>(),
                                blocks.scale_table->const_data_ptr<float>(),
                                blocks.scale_scale->const_data_ptr<float>(),
                                *blocks.scale_offset->const_data_ptr<float>(), blocks.scale_block};
      nested.read({block, block + some}, scales);
      args.scale = scales;
    } else {
      args.scale = blocks.scale.const_data_ptr<float>() + block;
    }
    dequantize_kernels().four_bits(args, {0, some});
  }

  void multiply_values(const Product& piece) const {
    alignas(64) float t[kMaxRows * kPieceColumns];
    const int64_t ranks = piece.view.rank, rows = piece.rows.end - piece.rows.begin;
    const ShrinkArgs args = shrink_args(args_.x, piece.view, nullptr, 1.0, t, Dropout{},
                                        {where_.data() + piece.rows.begin});
    kernels_.shrink_few(args, piece.view, {0, rows});
    for (int64_t m = 0; m < rows; ++m) {
      std::copy_n(t + m * ranks, ranks, piece.to + m * piece.pitch);
    }
  }

  // Writes Y in its dtype, for a range of columns.
  template <class Value>
  void finish(Range columns) const {
    const int64_t rows = args_.rows(), width = y_.size(1);
    const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() : nullptr;
    auto* y = static_cast<Value*>(y_.mutable_data_ptr());
    const float* sums = sums_.const_data_ptr<float>();
    std::vector<Adapter> adapters;
    int64_t first = 0;
    for (size_t i = 0; i < args_.lora_a.size(); ++i) {
      adapters.push_back(adapter(i, first));
      if (adapters.back().rows.empty()) adapters.pop_back();
      if (!args_.adapters) first += args_.rank_of(i);
    }
    std::vector<float> own(args_.experts.size());
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      for (int64_t m = 0; m < rows; ++m) {
        own[m] = sums[m * width + n];
        if (bias != nullptr) own[m] += bias[args_.experts[m] * width + n];
      }
      for (Adapter& each : adapters) {
        switch (dtype_of(each.b->scalar_type())) {
          case Dtype::kBFloat16:
            add_update<BFloat16>(each, n, own);
            break;
          case Dtype::kFloat16:
            add_update<Float16>(each, n, own);
            break;
          default:
            add_update<float>(each, n, own);
        }
      }
      for (int64_t m = 0; m < rows; ++m) from_float(own[m], y + m * width + n);
    }
  }

  struct Adapter {
    const at::Tensor* b;
    int64_t rank;
    float scaling;
    std::vector<int64_t> rows, experts;  // those that have it, m of them, and the expert of each
    std::vector<float> s;                // [rank, m]
    std::vector<float> sums;             // [m]
    std::vector<int64_t> lines;          // one expert for each cache line that is read
  };

  Adapter adapter(size_t i, int64_t first) const {
    Adapter out{&args_.lora_b[i],
                args_.rank_of(i),
                static_cast<float>(args_.scalings[i]),
                rows_of(i),
                {},
                {},
                {},
                {}};
    const size_t rows = out.rows.size();
    out.s.resize(out.rank * rows), out.sums.resize(rows);
    const float* s = s_.const_data_ptr<float>() + first;
    int64_t last = -1;
    for (size_t m = 0; m < rows; ++m) {
      const int64_t row = out.rows[m], expert = args_.experts[row];
      for (int64_t j = 0; j < out.rank; ++j) out.s[j * rows + m] = s[row * s_.size(1) + j];
      out.experts.push_back(expert);
      const int64_t line = expert * out.b->element_size() / kLine;
      if (line != last) out.lines.push_back(expert);
      last = line;
    }
    return out;
  }

  std::vector<int64_t> rows_of(size_t adapter) const {
    std::vector<int64_t> rows(args_.experts.size());
    std::iota(rows.begin(), rows.end(), 0);
    if (args_.adapters) {
      const auto is_another = [&](int64_t row) {
        return (*args_.adapters)[row] != static_cast<int64_t>(adapter);
      };
      rows.erase(std::remove_if(rows.begin(), rows.end(), is_another), rows.end());
    }
    return rows;
  }

  // own[m] += scaling * sum_j s[m, j] B_e[n, j]
  template <class Value>
  void add_update(Adapter& adapter, int64_t n, std::vector<float>& own) const {
    const size_t rows = adapter.rows.size();
    const int64_t experts = args_.weight.size(0), ahead = kPrefetched / sizeof(Value);
    const auto* at = static_cast<const Value*>(adapter.b->const_data_ptr());
    at += n * adapter.rank * experts;
    const float* s = adapter.s.data();
    const int64_t* expert_of = adapter.experts.data();
    float* sums = adapter.sums.data();
    std::fill_n(sums, rows, 0.0f);
    for (int64_t j = 0; j < adapter.rank; ++j, at += experts, s += rows) {
      for (const int64_t expert : adapter.lines) __builtin_prefetch(at + ahead + expert);
      for (size_t m = 0; m < rows; ++m) sums[m] += s[m] * to_float(at[expert_of[m]]);
    }
    for (size_t m = 0; m < rows; ++m) own[adapter.rows[m]] += adapter.scaling * sums[m];
  }

  const ExpertsArgs& args_;
  const SkinnyKernels& kernels_;
  std::vector<int32_t> where_;
  at::Tensor sums_, s_, y_, bias_;
};

}  // namespace

Forward experts_few_rows(const ExpertsArgs& args) { return FewRows(args).run(); }

}  // namespace lora_ext::cpu
