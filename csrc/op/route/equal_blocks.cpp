// Every block is the same call: its rows are copied into one buffer, whose alignment is always the
// same, and missing rows are filled with zeros. What depends on the library is that it multiplies
// all rows of one product in the same way, at any position. Some libraries do not, in the last
// rows: so before the first call of a kind, a block of equal rows is tried.
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "op/route/route.h"

namespace lora_ext::route {
namespace {

at::Tensor rows_like(const at::Tensor& tensor, int64_t rows) {
  return at::empty({rows, tensor.size(1)}, tensor.options());
}

// to[: count] = from[row : row + count], the rest zeros; both [rows, columns].
void copy_block(const at::Tensor& from, int64_t row, int64_t count, at::Tensor& to) {
  to.narrow(0, 0, count).copy_(from.narrow(0, row, count));
  if (count < to.size(0)) to.narrow(0, count, to.size(0) - count).zero_();
}

template <class Run>
void for_equal_blocks(int64_t rows, int64_t block, const Run& run) {
  for (int64_t row = 0; row < rows; row += block) run(row, std::min(block, rows - row));
}

// [rows, columns] of numbers whose sum differs if they are added in another order.
at::Tensor wave(int64_t rows, int64_t columns, const at::Tensor& like) {
  const at::Tensor numbers = at::arange(rows * columns, like.options().dtype(at::kDouble));
  return numbers.mul_(0.7).sin_().view({rows, columns}).to(like.scalar_type());
}

at::Tensor equal_rows(int64_t rows, const at::Tensor& like) {
  return wave(1, like.size(1), like).expand({rows, like.size(1)}).contiguous();
}

Update waves_like(const Update& update) {
  const at::Tensor &a = update.a(), &b = update.b();
  return Update::one(wave(a.size(0), a.size(1), a), wave(b.size(0), b.size(1), b), 1.0);
}

void check_rows_are_alike(const at::Tensor& rows, const Base& base, int64_t block) {
  const at::ScalarType bits = rows.itemsize() == sizeof(int16_t)   ? at::kShort
                              : rows.itemsize() == sizeof(int32_t) ? at::kInt
                                                                   : at::kLong;
  const at::Tensor values = rows.view(bits);
  TORCH_CHECK_NOT_IMPLEMENTED(
      at::equal(values, values.narrow(0, 0, 1).expand_as(values)),
      "lora_ext.batch_invariant: expected torch's products to multiply all rows alike, but with ",
      block, " rows and a weight of ", base.weight.sizes(), " in ", base.weight.scalar_type(),
      " they do not on this processor; call it outside of the block, or in another dtype");
}

// What selects the kernels of a block: forward or backward, sizes, the weight's strides, whether
// there is a bias, dtypes, number of threads, and the instruction set of our kernels.
using Kind = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                        at::ScalarType, at::ScalarType, int, std::string>;

// Calls run() before the first call of each kind.
template <class Run>
void once_for(bool is_forward, const at::Tensor& x, const Base& base, const Update& update,
              int64_t block, const Run& run) {
  static std::mutex mutex;
  static std::set<Kind> tried;
  const Kind kind{is_forward,
                  block,
                  update.in_features(),
                  update.out_features(),
                  update.rank(),
                  base.weight.stride(0),
                  base.weight.stride(1),
                  base.bias.has_value(),
                  x.scalar_type(),
                  update.a().scalar_type(),
                  at::get_num_threads(),
                  cpu::current_isa()};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (tried.count(kind) != 0) return;
  }
  run();
  const std::lock_guard<std::mutex> lock(mutex);
  tried.insert(kind);
}

void try_forward(ForwardArgs args, int64_t block) {
  once_for(true, args.x, args.base, args.update, block, [&] {
    args.x = equal_rows(block, args.x);
    args.update = waves_like(args.update);
    args.need_s = true;
    const Forward found = forward(args);
    check_rows_are_alike(found.y, args.base, block);
    check_rows_are_alike(found.s, args.base, block);
  });
}

void try_backward(BackwardArgs args, int64_t block) {
  once_for(false, args.x, args.base, args.update, block, [&] {
    args.grad = equal_rows(block, args.grad);
    args.update = waves_like(args.update);
    check_rows_are_alike(backward(args).dx, args.base, block);
  });
}

}  // namespace

Forward forward_in_blocks(const ForwardArgs& args) {
  const int64_t rows = args.x.size(0), block = args.base.row_block;
  const int64_t first_row = args.update.dropout.first_row();
  ForwardArgs own = args;
  own.base.row_block = 0;
  own.base.packed = std::nullopt;
  try_forward(own, block);
  own.x = rows_like(args.x, block);
  Forward out{at::empty({rows, args.update.out_features()}, args.x.options()), {}};
  for_equal_blocks(rows, block, [&](int64_t row, int64_t count) {
    copy_block(args.x, row, count, own.x);
    own.update.dropout.row_offset = first_row + row;
    const Forward part = forward(own);
    out.y.narrow(0, row, count).copy_(part.y.narrow(0, 0, count));
    if (!args.need_s) return;
    if (!out.s.defined()) out.s = rows_like(part.s, rows);
    out.s.narrow(0, row, count).copy_(part.s.narrow(0, 0, count));
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
  own.grad = rows_like(args.grad, block);
  own.x = rows_like(args.x, block), own.s = rows_like(args.s, block);  // not read for dX
  try_backward(own, block);
  out.dx = rows_like(args.x, rows);
  for_equal_blocks(rows, block, [&](int64_t row, int64_t count) {
    copy_block(args.grad, row, count, own.grad);
    own.update.dropout.row_offset = first_row + row;
    const Backward part = backward(own);
    out.dx.narrow(0, row, count).copy_(part.dx.narrow(0, 0, count));
  });
  return out;
}

}  // namespace lora_ext::route
