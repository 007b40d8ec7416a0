// Every block is the same call: its rows are copied into one buffer, whose alignment is always the
// same, and missing rows are filled with zeros. What depends on the library is that it multiplies
// all rows of one product in the same way, at any position. Some libraries do not: in the last rows,
// or, as MKL on AMD's processors, where rows of x or of a result begin at other alignments (float64
// with an odd number of columns, narrow products in float32). So before the first call of a kind
// blocks of equal rows are tried. Where results differ, operands are filled up with zeros to widths
// of which all rows are alike.
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "op/route/route.h"

namespace lora_ext::route {
namespace {

constexpr int64_t kLine = 64;  // bytes of a line of the cache
// Narrower operands are always filled up: in half types a trial hardly sees other roundings of the
// sums in float32 that are in between.
constexpr int64_t kNarrow = 16;

// Columns of x, of y and of S.
struct Widths {
  int64_t in, out, rank;
};

// Zeros [rows, columns], of which each row begins a line of the cache.
at::Tensor lines(int64_t rows, int64_t columns, const at::Tensor& like) {
  const int64_t pitch = cpu::round_up(columns, kLine / like.itemsize());
  return at::zeros({rows, pitch}, like.options()).narrow(1, 0, columns);
}

// from [m, n] and zeros [rows, columns] around it.
at::Tensor filled(const at::Tensor& from, int64_t rows, int64_t columns) {
  at::Tensor to = at::zeros({rows, columns}, from.options());
  to.narrow(0, 0, from.size(0)).narrow(1, 0, from.size(1)).copy_(from);
  return to;
}

// Fills operands up. Factors are always copied: in one layout, they need no trial of their own.
template <class Args>
void fill_up(Args& args, const Widths& to) {
  at::Tensor& weight = args.base.weight;
  std::optional<at::Tensor>& bias = args.base.bias;
  args.update.lora_a = {filled(args.update.a(), to.rank, to.in)};
  args.update.lora_b = {filled(args.update.b(), to.out, to.rank)};
  if (weight.size(0) != to.out || weight.size(1) != to.in) weight = filled(weight, to.out, to.in);
  if (bias && bias->size(0) != to.out) bias = filled(bias->unsqueeze(0), 1, to.out).squeeze(0);
}

// The first rows and columns of to = from[row : row + count], other rows zeros.
void copy_block(const at::Tensor& from, int64_t row, int64_t count, at::Tensor& to) {
  to.narrow(0, 0, count).narrow(1, 0, from.size(1)).copy_(from.narrow(0, row, count));
  if (count < to.size(0)) to.narrow(0, count, to.size(0) - count).zero_();
}

// to[row : row + count] = the first rows and columns of from.
void put_block(const at::Tensor& from, int64_t row, int64_t count, at::Tensor& to) {
  to.narrow(0, row, count).copy_(from.narrow(0, 0, count).narrow(1, 0, to.size(1)));
}

template <class Run>
void for_equal_blocks(int64_t rows, int64_t block, const Run& run) {
  for (int64_t row = 0; row < rows; row += block) run(row, std::min(block, rows - row));
}

// Numbers whose sum differs if they are added in another order, others for each `first`.
at::Tensor wave(int64_t rows, int64_t columns, const at::Tensor& like, int64_t first = 0) {
  const auto options = like.options().dtype(at::kDouble);
  const at::Tensor numbers = at::arange(first, first + rows * columns, options);
  return numbers.mul_(0.7).sin_().view({rows, columns}).to(like.scalar_type());
}

int64_t alignment_of(const at::Tensor& tensor) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kLine);
}

// A wave, repeated after a prime number, in the layout and alignment of a weight, which may be zeros.
at::Tensor wave_like(const at::Tensor& weight) {
  constexpr int64_t kPeriod = 8191;
  const int64_t first = alignment_of(weight) / weight.itemsize();
  int64_t count = first + 1;
  for (const int64_t dim : {0, 1}) count += (weight.size(dim) - 1) * weight.stride(dim);
  const at::Tensor period = wave(1, kPeriod, weight).view({kPeriod});
  return period.repeat({count / kPeriod + 1}).as_strided(weight.sizes(), weight.strides(), first);
}

bool are_alike(const at::Tensor& rows) {
  const at::ScalarType bits = rows.itemsize() == sizeof(int16_t)   ? at::kShort
                              : rows.itemsize() == sizeof(int32_t) ? at::kInt
                                                                   : at::kLong;
  const at::Tensor values = rows.view(bits);
  return at::equal(values, values.narrow(0, 0, 1).expand_as(values));
}

// Whether run(row, operands) finds all rows alike that are this row of so many columns. One wave
// shows the other roundings of 9 sums of 9 numbers in two cases of five only. The larger of W's
// product and the update hides how the other is rounded, and a scaling of 1, for which libraries may
// have other code, that s is multiplied: so there are several scalings.
template <class Args, class Run>
bool tries(Args args, const Widths& widths, int64_t columns, const Run& run) {
  const at::Tensor &a = args.update.a(), &b = args.update.b();
  args.base.weight = wave_like(args.base.weight);
  args.update = Update::one(wave(a.size(0), a.size(1), a), wave(b.size(0), b.size(1), b), 1.0);
  fill_up(args, widths);
  constexpr double kScalings[] = {0.003, 0.7, 1, 70};
  const int64_t waves = std::clamp<int64_t>((1 << 26) / (widths.in * widths.out), 4, 16);
  for (int64_t i = 0; i < waves; ++i) {
    args.update.scaling = kScalings[i % std::size(kScalings)];
    if (!run(wave(1, columns, args.x, i * columns), args)) return false;
  }
  return true;
}

// What selects the kernels of a block: forward or backward, sizes, the weight's strides and
// alignment, whether there is a bias, dtypes, number of threads, and the instruction set of our
// kernels.
using Kind = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, bool, at::ScalarType, at::ScalarType, int, std::string>;

// The first widths with which the rows of a block are alike, kept for each kind of call.
template <class Args, class Try>
Widths widths_of(bool is_forward, const Args& args, int64_t block, const Try& has_equal_rows) {
  static std::mutex mutex;
  static std::map<Kind, Widths> known;
  const at::Tensor& weight = args.base.weight;
  Widths own{std::max(kNarrow, weight.size(1)), std::max(kNarrow, weight.size(0)),
             args.update.rank()};
  // What dropout leaves of x lies without gaps.
  if (is_forward && args.update.dropout.enabled()) {
    own.in = cpu::round_up(own.in, kLine / args.x.itemsize());
  }
  const Kind kind{is_forward,
                  block,
                  own.in,
                  weight.size(1),
                  weight.size(0),
                  own.rank,
                  weight.stride(0),
                  weight.stride(1),
                  alignment_of(weight),
                  args.base.bias.has_value(),
                  args.x.scalar_type(),
                  args.update.a().scalar_type(),
                  at::get_num_threads(),
                  cpu::current_isa()};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(kind);
    if (found != known.end()) return found->second;
  }
  std::vector<Widths> candidates;
  for (const bool all : {false, true}) {
    for (const int64_t step : {kNarrow, 2 * kNarrow, 4 * kNarrow}) {
      const int64_t wide = all ? step : 1;
      candidates.push_back({cpu::round_up(own.in, wide), cpu::round_up(own.out, wide),
                            cpu::round_up(own.rank, step)});
    }
  }
  std::string tried;
  for (const Widths& each : candidates) {
    if (has_equal_rows(each)) {
      const std::lock_guard<std::mutex> lock(mutex);
      return known[kind] = each;
    }
    tried += c10::str(" [", each.in, ", ", each.out, ", ", each.rank, "]");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      "lora_ext.batch_invariant: expected torch's products to multiply all rows alike, but with ",
      block, " rows and a weight of ", weight.sizes(), " in ", weight.scalar_type(),
      " they do not on this processor with any of these columns [in, out, rank], filled up with "
      "zeros:",
      tried, "; call it outside of the block, or in another dtype");
}

}  // namespace

Forward forward_in_blocks(const ForwardArgs& args) {
  const int64_t rows = args.x.size(0), block = args.base.row_block, rank = args.update.rank();
  const int64_t first_row = args.update.dropout.first_row();
  ForwardArgs own = args;
  own.base.row_block = 0;
  own.base.packed = std::nullopt;
  const auto has_equal_rows = [&](const Widths& widths) {
    return tries(own, widths, widths.in, [&](const at::Tensor& row, ForwardArgs& trial) {
      trial.x = lines(block, widths.in, args.x).copy_(row), trial.need_s = true;
      const Forward found = forward(trial);
      return are_alike(found.y) && are_alike(found.s);
    });
  };
  const Widths widths = widths_of(true, own, block, has_equal_rows);
  fill_up(own, widths);
  own.x = lines(block, widths.in, args.x);
  Forward out{at::empty({rows, args.update.out_features()}, args.x.options()), {}};
  for_equal_blocks(rows, block, [&](int64_t row, int64_t count) {
    copy_block(args.x, row, count, own.x);
    own.update.dropout.row_offset = first_row + row;
    const Forward part = forward(own);
    put_block(part.y, row, count, out.y);
    if (!args.need_s) return;
    if (!out.s.defined()) out.s = at::empty({rows, rank}, part.s.options());
    put_block(part.s, row, count, out.s);
  });
  return out;
}

Backward backward_in_blocks(const BackwardArgs& args) {
  const int64_t rows = args.x.size(0), block = args.base.row_block;
  const int64_t first_row = args.update.dropout.first_row();
  BackwardArgs own = args;
  own.base.row_block = 0;
  Backward out = Backward::one();
  if (args.wanted.any_a() || args.wanted.any_b()) {
    own.wanted.dx = false;
    out = backward(own);
  }
  if (!args.wanted.dx) return out;
  own.wanted = Wanted::one(true, false, false);
  own.base.packed_t = std::nullopt;
  // x and S are not read for dX.
  const auto set_rows = [&](BackwardArgs& to, const Widths& widths) {
    to.grad = lines(block, widths.out, args.grad);
    to.x = at::empty({block, widths.in}, args.x.options());
    to.s = at::empty({block, widths.rank}, args.s.options());
  };
  const auto has_equal_rows = [&](const Widths& widths) {
    return tries(own, widths, widths.out, [&](const at::Tensor& row, BackwardArgs& trial) {
      set_rows(trial, widths);
      trial.grad.copy_(row);
      return are_alike(backward(trial).dx);
    });
  };
  const Widths widths = widths_of(false, own, block, has_equal_rows);
  fill_up(own, widths);
  set_rows(own, widths);
  out.dx = at::empty(args.x.sizes(), args.x.options());
  for_equal_blocks(rows, block, [&](int64_t row, int64_t count) {
    copy_block(args.grad, row, count, own.grad);
    own.update.dropout.row_offset = first_row + row;
    put_block(backward(own).dx, row, count, out.dx);
  });
  return out;
}

}  // namespace lora_ext::route
