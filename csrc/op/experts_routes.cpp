// The ops around the products of a mixture's experts on a device (kernels/lora_experts.h): the order
// of the rows, the factors of all experts as pools, and the sum over a token's slots with its
// gradients. None of them is differentiable, and none reads a number on the host.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "kernels/device.h"
#include "kernels/lora_experts.h"
#include "op/checks.h"
#include "op/launch/kernel_launch.h"
#include "op/launch/launch_parts.h"

namespace lora_ext::experts {
namespace {

using Routes = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Pools = std::tuple<at::Tensor, at::Tensor>;
using LowRank = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

// What the arguments of a call have in common.
struct Call {
  const char* op;
  at::Device device;
  at::ScalarType half;  // of rows and pools

  // Of a shape and one of two dtypes; contiguous, or of rows of unit stride.
  void check(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef shape,
             at::ScalarType one, at::ScalarType other, bool in_rows = false) const {
    const at::ScalarType dtype = tensor.scalar_type();
    EXPECT_TYPE(dtype == one || dtype == other, "expected ", name, " in ", one,
                one == other ? "" : c10::str(" or ", other), ", but got ", dtype);
    const bool unit_stride = in_rows && tensor.dim() == 2 && tensor.sym_stride(1) == 1;
    EXPECT(tensor.sym_sizes() == shape && (unit_stride || tensor.is_contiguous()), "expected ",
           name, " of shape ", shape, in_rows ? ", contiguous along its rows" : ", contiguous",
           ", but got shape ", tensor.sym_sizes(), " and strides ", tensor.sym_strides());
    EXPECT(tensor.device() == device, "expected ", name, " on ", device, ", but got it on ",
           tensor.device());
    for (const c10::SymInt& size : shape)
      EXPECT(size < int64_t{1} << 31, "expected ", name, " below 2^31 in each size, but got ",
             shape);
  }
  // Halves.
  void check_rows(const char* name, const at::Tensor& rows, c10::SymIntArrayRef shape) const {
    EXPECT_TYPE(is_half(half), "expected rows in bfloat16 or float16, but got ", half);
    check(name, rows, shape, half, half, true);
  }
  void check_numbers(const char* name, const at::Tensor& numbers, c10::SymIntArrayRef shape) const {
    check(name, numbers, shape, at::kInt, at::kInt);
  }
  // Of `rows` sorted slots; weights are [tokens, k], or flat.
  void check_slots(const c10::SymInt& rows, const c10::SymInt& slots, const at::Tensor& offs,
                   const MaybeTensor& weights) const {
    EXPECT(slots > 0 && rows % slots == 0, "expected rows of tokens with ", slots,
           " slots each, but got ", rows);
    EXPECT(offs.sym_numel() > 0, "expected offs of at least one expert, but got none");
    check_numbers("offs", offs, {offs.sym_numel()});
    if (weights && weights->dim() == 1) check("weights", *weights, {rows}, at::kFloat, half);
    if (weights && weights->dim() != 1)
      check("weights", *weights, {rows / slots, slots}, at::kFloat, half);
  }

  void launch(const kernel::ExpertsParams& params) const {
    TORCH_CHECK_NOT_IMPLEMENTED(kernel_launch::has_kernels(device), "lora_ext.", op,
                                ": there is no kernel on ", device);
    const c10::DeviceGuard guard(device);
    kernel_launch::check_launch(
        cuda::launch_experts(dtype_of(half), params, kernel_launch::stream_of(device)), device);
  }
};

const int* at(const at::Tensor& numbers) { return numbers.const_data_ptr<int>(); }
int size(const at::Tensor& tensor, int64_t dim) { return static_cast<int>(tensor.size(dim)); }
bool in_float(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat; }

// ---- experts_routes ----

Routes experts_routes_meta(const at::Tensor& top_k_index, c10::SymInt experts, int64_t adapters) {
  const char* op = "experts_routes";
  EXPECT(top_k_index.dim() == 2 && top_k_index.sym_size(1) > 0 && experts > 0,
         "expected top_k_index of shape [tokens, k] of at least one expert, but got ",
         top_k_index.sym_sizes(), " of ", experts);
  EXPECT(adapters > 0, "expected at least one of adapters, but got ", adapters);
  const c10::SymInt rows = top_k_index.sym_numel();
  EXPECT(rows < int64_t{1} << 31, "expected fewer than 2^31 slots, but got ", rows);
  const Call call{op, top_k_index.device(), at::kBFloat16};
  call.check("top_k_index", top_k_index, top_k_index.sym_sizes(), at::kLong, at::kInt, true);
  const at::TensorOptions options = top_k_index.options().dtype(at::kInt);
  const auto made = [&](const c10::SymInt& count) { return at::empty_symint({count}, options); };
  // More than plan::experts_tables takes, in numbers of a traced program.
  const at::Tensor tables =
      at::empty_symint({rows + 80 * experts + 4096}, options.dtype(at::kByte));
  return {made(rows), made(rows), made(rows), made(experts), tables};
}

Routes experts_routes(const at::Tensor& top_k_index, int64_t experts, int64_t adapters) {
  Routes routes = experts_routes_meta(top_k_index, experts, adapters);
  auto& [perm, token, place, offs, tables] = routes;
  const at::Tensor index = top_k_index.contiguous();
  kernel::ExpertsRoutesParams params{};
  params.index = index.const_data_ptr(), params.is_long = index.scalar_type() == at::kLong;
  params.perm = perm.mutable_data_ptr<int>(), params.token = token.mutable_data_ptr<int>();
  params.place = place.mutable_data_ptr<int>(), params.offs = offs.mutable_data_ptr<int>();
  params.rows = size(perm, 0), params.slots = size(index, 1), params.experts = size(offs, 0);
  params.adapters = static_cast<int>(adapters);
  if (params.rows == 0) return offs.zero_(), routes;
  const char* op = "experts_routes";
  const int64_t chunks = (index.numel() + params.kChunk - 1) / params.kChunk;
  const at::Tensor counts = at::empty({(experts + 1) * chunks}, offs.options());
  params.counts = counts.mutable_data_ptr<int>();
  const plan::ExpertsTables made = plan::experts_tables(params.rows, params.experts);
  EXPECT(made.bytes <= tables.numel(), "expected tables of at most ", tables.numel(),
         " bytes, but got ", made.bytes);
  params.tables = kernel::tables_at(made.tables, tables.mutable_data_ptr<uint8_t>());
  Call{op, index.device(), at::kBFloat16}.launch(params);
  return routes;
}

// ---- experts_factors ----

Pools experts_factors_meta(at::TensorList lora_a, at::TensorList lora_b,
                           at::ArrayRef<double> scalings, c10::SymInt experts, at::ScalarType dtype,
                           int64_t terms, const MaybeTensor& offs, bool by_row) {
  const char* op = "experts_factors";
  const size_t count = lora_a.size();
  EXPECT(count > 0 && lora_b.size() == count && scalings.size() == count && experts > 0,
         "expected as many of lora_a, lora_b and scalings, at least one, and an expert, but got ",
         count, ", ", lora_b.size(), ", ", scalings.size(), " and ", experts);
  EXPECT_TYPE(is_half(dtype), "expected dtype bfloat16 or float16, but got ", dtype);
  EXPECT(terms == 1 || terms == 2, "expected 1 or 2 terms, but got ", terms);
  EXPECT(lora_a[0].dim() == 2 && lora_b[0].dim() == 2,
         "expected lora_a and lora_b of 2 dimensions, but got ", lora_a[0].sym_sizes(), " and ",
         lora_b[0].sym_sizes());
  const c10::SymInt in = lora_a[0].sym_size(1), out = lora_b[0].sym_size(0);
  const Call call{op, lora_a[0].device(), dtype};
  c10::SymInt all = 0;
  for (size_t i = 0; i < count; ++i) {
    const c10::SymInt rank = lora_a[i].sym_size(0) / experts;
    call.check("lora_a", lora_a[i], {experts * rank, in}, at::kFloat, dtype);
    call.check("lora_b", lora_b[i], {out, rank * experts}, at::kFloat, dtype);
    all = by_row ? all.max(rank) : all + rank;
  }
  EXPECT(all > 0, "expected a rank above 0, but got ", all);
  if (by_row) experts = experts * (static_cast<int64_t>(count) + 1);
  if (offs) call.check_numbers("offs", *offs, {experts});
  const c10::SymInt columns = (all + 7) / 8 * 8 * terms;
  const at::TensorOptions options = lora_a[0].options().dtype(dtype);
  return {at::empty_symint({experts, columns, in}, options),
          at::empty_symint({experts, out, columns}, options)};
}

// Params have what is made beside the pools, or instead of the first.
void launch_factors(kernel::ExpertsFactorsParams params, const at::Tensor& a, const at::Tensor& b,
                    at::TensorList lora_a, at::TensorList lora_b, at::ArrayRef<double> scalings,
                    int64_t experts, int64_t terms, const MaybeTensor& offs, bool by_row = false) {
  params.pool_a = a.mutable_data_ptr(), params.pool_b = b.mutable_data_ptr();
  params.offs = offs ? at(*offs) : nullptr;
  params.experts = static_cast<int>(experts), params.in = size(a, 2), params.out = size(b, 1);
  params.terms = static_cast<int>(terms), params.width = size(a, 1) / params.terms;
  const Call call{"experts_factors", a.device(), a.scalar_type()};
  params.groups = size(a, 0) / params.experts;
  if (by_row) {  // rows without an adapter: zeros
    params.ranks = params.width;
    call.launch(params);
  }
  for (size_t i = 0; i < lora_a.size(); ++i, params.first += by_row ? 0 : params.ranks) {
    if (by_row) ++params.group;
    params.lora_a = lora_a[i].const_data_ptr(), params.lora_b = lora_b[i].const_data_ptr();
    params.a_in_float = in_float(lora_a[i]), params.b_in_float = in_float(lora_b[i]);
    params.rank = size(lora_a[i], 0) / params.experts;
    // The last one writes the zeros, too.
    params.ranks = by_row || i + 1 == lora_a.size() ? params.width - params.first : params.rank;
    params.scale = static_cast<float>(scalings[i]);
    if (params.ranks > 0) call.launch(params);
  }
}

Pools experts_factors(at::TensorList lora_a, at::TensorList lora_b, at::ArrayRef<double> scalings,
                      int64_t experts, at::ScalarType dtype, int64_t terms, const MaybeTensor& offs,
                      bool by_row) {
  Pools pools = experts_factors_meta(lora_a, lora_b, scalings, experts, dtype, terms, offs, by_row);
  launch_factors({}, std::get<0>(pools), std::get<1>(pools), lora_a, lora_b, scalings, experts,
                 terms, offs, by_row);
  return pools;
}

// ---- experts_low_rank ----

LowRank experts_low_rank_meta(const at::Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
                              at::ArrayRef<double> scalings, double /*scaling*/,
                              c10::SymInt experts, int64_t terms, const at::Tensor& offs,
                              const MaybeTensor& x_rows) {
  const Call call{"experts_low_rank", x.device(), x.scalar_type()};
  const auto [a, b] =
      experts_factors_meta(lora_a, lora_b, scalings, experts, call.half, terms, offs, false);
  call.check_rows("x", x, {x.sym_size(0), a.sym_size(2)});
  if (x_rows) call.check_numbers("x_rows", *x_rows, {x_rows->sym_numel()});
  c10::SymInt rank = 0, rows = x_rows ? x_rows->sym_size(0) : x.sym_size(0);
  for (const at::Tensor& each : lora_a) rank = rank + each.sym_size(0) / experts;
  return {a, b, at::empty_symint({rows, rank}, x.options().dtype(at::kFloat)),
          at::empty_symint({rows, a.sym_size(1)}, x.options())};
}

LowRank experts_low_rank(const at::Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
                         at::ArrayRef<double> scalings, double scaling, int64_t experts,
                         int64_t terms, const at::Tensor& offs, const MaybeTensor& x_rows) {
  LowRank made =
      experts_low_rank_meta(x, lora_a, lora_b, scalings, scaling, experts, terms, offs, x_rows);
  auto& [a, b, s, t] = made;
  if (s.numel() == 0) return made;
  kernel::ExpertsFactorsParams params{};
  params.x = x.const_data_ptr(), params.x_pitch = kernel_launch::pitch_of(x);
  params.x_rows = x_rows ? at(*x_rows) : nullptr;
  params.s = s.mutable_data_ptr<float>(), params.t = t.mutable_data_ptr();
  params.rows = size(s, 0), params.s_pitch = size(s, 1);
  params.t_scale = static_cast<float>(scaling);
  launch_factors(params, a, b, lora_a, lora_b, scalings, experts, terms, offs);
  return made;
}

// ---- experts_sum ----

at::Tensor experts_sum_meta(const at::Tensor& rows, const at::Tensor& place, const at::Tensor& offs,
                            const MaybeTensor& weights, c10::SymInt slots) {
  const Call call{"experts_sum", rows.device(), rows.scalar_type()};
  const c10::SymInt count = rows.sym_size(0), n = rows.sym_size(1);
  call.check_rows("rows", rows, {count, n});
  call.check_numbers("place", place, {count});
  call.check_slots(count, slots, offs, weights);
  return at::empty_symint({count / slots, n}, rows.options());
}

at::Tensor experts_sum(const at::Tensor& rows, const at::Tensor& place, const at::Tensor& offs,
                       const MaybeTensor& weights, int64_t slots) {
  at::Tensor out = experts_sum_meta(rows, place, offs, weights, slots);
  if (out.numel() == 0) return out;
  kernel::ExpertsSumParams params{};
  params.rows = rows.const_data_ptr(), params.pitch = kernel_launch::pitch_of(rows);
  params.place = at(place), params.count = at(offs) + offs.numel() - 1;
  params.weights = weights ? weights->const_data_ptr() : nullptr;
  params.weights_in_float = weights && in_float(*weights);
  params.out = out.mutable_data_ptr();
  params.tokens = size(out, 0), params.slots = static_cast<int>(slots), params.n = size(out, 1);
  Call{"experts_sum", rows.device(), rows.scalar_type()}.launch(params);
  return out;
}

// ---- experts_dot ----

at::Tensor experts_dot_meta(const at::Tensor& x, at::Tensor& dx, const at::Tensor& perm,
                            const at::Tensor& offs, const at::Tensor& weights, c10::SymInt slots,
                            const MaybeTensor& grad, const MaybeTensor& bias) {
  const char* op = "experts_dot";
  const Call call{op, x.device(), x.scalar_type()};
  const c10::SymInt count = x.sym_size(0);
  call.check_rows("x", x, {count, x.sym_size(1)});
  call.check_rows("dx", dx, x.sym_sizes());
  call.check_numbers("perm", perm, {count});
  call.check_slots(count, slots, offs, weights);
  EXPECT(grad.has_value() == bias.has_value(), "expected both of grad and bias, or none");
  if (bias) {
    call.check_rows("bias", *bias, {offs.sym_numel(), bias->sym_size(-1)});
    call.check_rows("grad", *grad, {count / slots, bias->sym_size(-1)});
  }
  return at::empty_symint(weights.sym_sizes(), weights.options());
}

at::Tensor experts_dot(const at::Tensor& x, at::Tensor& dx, const at::Tensor& perm,
                       const at::Tensor& offs, const at::Tensor& weights, int64_t slots,
                       const MaybeTensor& grad, const MaybeTensor& bias) {
  at::Tensor dweights = experts_dot_meta(x, dx, perm, offs, weights, slots, grad, bias);
  if (dweights.numel() == 0) return dweights;
  kernel::ExpertsDotParams params{};
  params.x = x.const_data_ptr(), params.x_pitch = kernel_launch::pitch_of(x);
  params.dx = dx.mutable_data_ptr(), params.dx_pitch = kernel_launch::pitch_of(dx);
  params.perm = at(perm), params.offs = at(offs);
  params.weights = weights.const_data_ptr(), params.dweights = dweights.mutable_data_ptr();
  params.weights_in_float = in_float(weights);
  params.rows = size(x, 0), params.slots = static_cast<int>(slots), params.n = size(x, 1);
  params.experts = size(offs, 0);
  if (bias) {
    params.grad = grad->const_data_ptr(), params.grad_pitch = kernel_launch::pitch_of(*grad);
    params.bias = bias->const_data_ptr(), params.bias_pitch = kernel_launch::pitch_of(*bias);
    params.bias_n = size(*bias, 1);
  }
  Call{"experts_dot", x.device(), x.scalar_type()}.launch(params);
  return dweights;
}

void register_all(torch::Library& m) {
  m.impl("experts_routes", TORCH_FN(experts_routes));
  m.impl("experts_factors", TORCH_FN(experts_factors));
  m.impl("experts_low_rank", TORCH_FN(experts_low_rank));
  m.impl("experts_sum", TORCH_FN(experts_sum));
  m.impl("experts_dot", TORCH_FN(experts_dot));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // perm, token, place and offs, all int32, of expert numbers [tokens, k], and bytes: the tables of
  // experts_product. Each expert has as many of the numbers, side by side, as there are adapters.
  m.def(
      "experts_routes(Tensor top_k_index, SymInt experts, int adapters=1) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  // Pools [experts, terms width, in] and [experts, out, terms width] of adapters of PEFT's layout,
  // joined along the rank; width is the sum of the ranks as a multiple of 8. With offs, experts
  // without rows are left as they are in memory. by_row: rows have one of n adapters or none, pools
  // are [experts (n + 1), ...], of none zeros, and width is of the largest rank.
  m.def(
      "experts_factors(Tensor[] lora_a, Tensor[] lora_b, float[] scalings, SymInt experts, "
      "ScalarType dtype, int terms, Tensor? offs=None, bool by_row=False) -> (Tensor, Tensor)",
      tags);
  // For few rows: the same pools, the first one not written, s [S, r] of sorted rows in float32 and
  // t = scaling * s [S, terms width] as experts_product reads it; rows of x are where x_rows says.
  m.def(
      "experts_low_rank(Tensor x, Tensor[] lora_a, Tensor[] lora_b, float[] scalings, "
      "float scaling, SymInt experts, int terms, Tensor offs, Tensor? x_rows) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      tags);
  // [tokens, n] of sorted rows [tokens k, n]; weights by slot.
  m.def(
      "experts_sum(Tensor rows, Tensor place, Tensor offs, Tensor? weights, SymInt slots) -> "
      "Tensor",
      tags);
  // The gradient of weights, from sorted x and dx / weight; multiplies dx by weight. The product
  // of a token's grad with the expert's bias is part of it.
  m.def(
      "experts_dot(Tensor x, Tensor(a!) dx, Tensor perm, Tensor offs, Tensor weights, "
      "SymInt slots, *, Tensor? grad=None, Tensor? bias=None) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  if (cuda::is_built()) register_all(m);  // for a device of the tests
}
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (cuda::is_built()) register_all(m);
}
TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("experts_routes", TORCH_FN(experts_routes_meta));
  m.impl("experts_factors", TORCH_FN(experts_factors_meta));
  m.impl("experts_low_rank", TORCH_FN(experts_low_rank_meta));
  m.impl("experts_sum", TORCH_FN(experts_sum_meta));
  m.impl("experts_dot", TORCH_FN(experts_dot_meta));
}

}  // namespace lora_ext::experts
