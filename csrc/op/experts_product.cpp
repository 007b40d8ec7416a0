// A projection of experts by the kernels of many adapters (kernels/lora_grouped.h), for rows that are
// sorted by expert. Not differentiable: the passes of lora_ext/experts/by_kernels.py call it.
//
//     y  = x W_e^T + b_e + s (mask * x A_e^T) B_e^T         s_ = mask * x A_e^T, saved
//     dx = g W_e + s mask * (g B_e A_e)
//     dA_e = s (w g B_e)^T (mask * x)    dB_e = s (w g)^T s_
//
// The rows of x, g and the mask are where x_rows, grad_rows and mask_rows say.
//
// The weight may be of a slice of the experts, which then alone have rows in y and dx: of the first
// in a call that computes all else, and of others in calls that write their rows into its y or dx,
// each with its workspace.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "common/bounds.h"
#include "common/check.h"
#include "op/checks.h"
#include "op/launch/kernel_launch.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

constexpr char op[] = "experts_product";  // in messages

using Optional = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What both directions have, as the schemas have it.
struct Product {
  const at::Tensor& weight;  // [E, N, K], or fewer of a slice, either of the last strides 1
  const at::Tensor &lora_a, &lora_b;  // pools of halves [E, C, K] and [E, N, C]
  int64_t rank;
  double scaling;
  const at::Tensor& offs;              // int32 [E]
  const Optional &x_rows, &mask_rows;  // int32 [S]
  DropoutArgs dropout;
  // The first expert of the slice, and if it is not 0 the y or dx and the workspace to go on with.
  int64_t first;
  const Optional &out, &workspace;
  const Optional &tables, &t;
  int64_t adapters;  // of which a row has one, each with factors of its own for every expert

  int64_t groups() const { return lora_a.size(0); }
  int64_t experts() const { return groups() / adapters; }
  bool is_whole() const { return weight.size(0) == experts(); }
  int64_t in_features() const { return weight.size(2); }
  int64_t out_features() const { return weight.size(1); }
  int64_t width() const { return (rank + 7) / 8 * 8; }
  bool float_adapters() const { return lora_a.size(1) == 2 * width(); }
};

void check_numbers(const char* name, const Optional& numbers, int64_t count, const at::Tensor& x) {
  EXPECT(
      !numbers || (numbers->scalar_type() == at::kInt && numbers->is_contiguous() &&
                   numbers->sizes() == at::IntArrayRef(count) && numbers->device() == x.device()),
      "expected contiguous ", name, " of int32 and shape [", count, "] on ", x.device(),
      ", but got ", numbers ? numbers->scalar_type() : at::kInt, " of ",
      numbers ? numbers->sizes() : at::IntArrayRef());
}

void check_rows(const char* name, const at::Tensor& rows, int64_t columns, const Product& given) {
  EXPECT(rows.dim() == 2 && rows.size(1) == columns && (columns == 1 || rows.stride(1) == 1) &&
             rows.scalar_type() == given.weight.scalar_type() &&
             rows.device() == given.weight.device(),
         "expected ", name, " of shape [rows, ", columns, "] in ", given.weight.scalar_type(),
         ", contiguous along its columns, but got ", rows.scalar_type(), " of ", rows.sizes(),
         " and strides ", rows.strides());
}

// A kernel takes those past as many rows as there are numbers as zero.
void check_height(const char* name, const at::Tensor& rows, int64_t count) {
  EXPECT(rows.size(0) <= count, "expected no more rows of ", name, " than of ", name, "_rows, ",
         count, ", but got ", rows.size(0));
}

// `out_columns`: of y or dx.
void check(const Product& given, const at::Tensor& x, int64_t count, int64_t out_columns) {
  const at::Tensor& weight = given.weight;
  EXPECT_TYPE(is_half(weight.scalar_type()), "expected a weight in bfloat16 or float16, but got ",
              weight.scalar_type());
  EXPECT(
      weight.dim() == 3 && weight.numel() > 0 && (weight.stride(1) == 1 || weight.stride(2) == 1),
      "expected a weight of shape [experts, out_features, in_features], not empty and with "
      "unit stride along one of the last two, but got ",
      weight.sizes(), " and strides ", weight.strides());
  EXPECT(given.lora_a.dim() == 3 && given.first >= 0 && given.adapters > 0 &&
             given.groups() % given.adapters == 0 &&
             given.first + weight.size(0) <= given.experts(),
         "expected pools of all experts, and of them the weight's ", weight.size(0), " from ",
         given.first, " on, but got ", given.lora_a.sizes(), " for ", given.adapters,
         " groups of each expert");
  check_rows("x", x, given.in_features(), given);
  EXPECT(given.rank >= 1 && given.rank <= kMaxRank, "expected a rank from 1 to ", kMaxRank,
         ", but got ", given.rank);
  const int64_t columns = given.float_adapters() ? 2 * given.width() : given.width();
  const std::array<int64_t, 3> a{given.groups(), columns, given.in_features()};
  const std::array<int64_t, 3> b{given.groups(), given.out_features(), columns};
  for (const auto& [pool, sizes] : {std::pair(&given.lora_a, a), std::pair(&given.lora_b, b)}) {
    EXPECT(pool->sizes() == at::IntArrayRef(sizes) && pool->is_contiguous() &&
               pool->scalar_type() == weight.scalar_type() && pool->device() == x.device(),
           "expected contiguous pools of halves, ", at::IntArrayRef(sizes), " in ",
           weight.scalar_type(), " for rank ", given.rank, ", but got ", pool->scalar_type(),
           " of ", pool->sizes());
  }
  check_numbers("offs", given.offs, given.groups(), x);
  check_numbers("x_rows", given.x_rows, count, x);
  check_height("x", x, count);
  check_numbers("mask_rows", given.mask_rows, count, x);
  const Optional& tables = given.tables;
  EXPECT(!tables || (tables->scalar_type() == at::kByte && tables->device() == x.device() &&
                     tables->numel() >= plan::experts_tables(count, given.groups()).bytes),
         "expected the tables of experts_routes for ", count, " rows and ", given.groups(),
         " experts on ", x.device(), ", but got ", tables ? tables->scalar_type() : at::kByte,
         " of ", tables ? tables->sizes() : at::IntArrayRef());
  const std::array<int64_t, 2> of_t{count, columns};
  EXPECT(!given.t ||
             (tables && given.t->sizes() == at::IntArrayRef(of_t) && given.t->is_contiguous() &&
              given.t->device() == x.device() && given.t->scalar_type() == weight.scalar_type()),
         "expected tables beside t, and a contiguous t of shape ", at::IntArrayRef(of_t), " in ",
         weight.scalar_type());
  if (given.first > 0) {
    EXPECT(given.out && given.workspace && given.out->is_contiguous() &&
               given.out->sizes() == at::IntArrayRef({count, out_columns}) &&
               given.workspace->scalar_type() == at::kByte,
           "expected the contiguous result [", count, ", ", out_columns,
           "] and the workspace of the first slice of experts");
    check_rows("the result of the first slice", *given.out, out_columns, given);
  }
  if (given.dropout.p == 0.0) return;
  EXPECT(given.dropout.seed && given.mask_rows, "expected a seed and mask_rows beside dropout");
  check_dropout_mask(op, *given.dropout.seed, x.size(0), x.size(1), given.dropout.p);
}

Update update_of(const Product& given, int64_t count, const Optional& grad_rows = {},
                 const Optional& weights = {}, const Optional& slots = {}) {
  ExpertRows rows{
      count,   given.rank, given.float_adapters(), given.x_rows, grad_rows, given.mask_rows,
      weights, slots,      given.tables,           given.t};
  if (given.first > 0)
    rows.first = given.first, rows.out = *given.out, rows.workspace = *given.workspace;
  rows.adapters = given.adapters;
  return {{given.lora_a},
          {given.lora_b},
          given.scaling,
          given.dropout,
          Grouping{{}, {}, given.offs, {}, rows}};
}

int64_t count_of(const at::Tensor& own, const Optional& rows) {
  return rows ? rows->size(0) : own.size(0);
}

// A defined tensor.
at::Tensor or_empty(const at::Tensor& tensor, const at::Tensor& x) {
  return tensor.defined() ? tensor : at::empty({0}, x.options().dtype(at::kByte));
}

// A slice, or a call with T, has no other route than the kernels: nothing, if the first one's cannot
// be used.
template <class Result, class Args>
std::optional<Result> of_slice(const Product& given, const Args& args,
                               std::optional<Result> (*run)(const Args&)) {
  std::optional<Result> out;
  if (kernel_launch::has_kernels(args.x.device())) out = run(args);
  EXPECT(out || given.first == 0,
         "expected for further experts the kernels of the first, but got the library route");
  return out;
}

template <bool kHasData>
ThreeTensors experts_product(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                             const at::Tensor& lora_a, const at::Tensor& lora_b, int64_t rank,
                             double scaling, const at::Tensor& offs, const Optional& x_rows,
                             const Optional& mask_rows, double dropout_p, const Optional& seed,
                             int64_t first, const Optional& y, const Optional& workspace,
                             const Optional& tables, const Optional& t, int64_t adapters) {
  const Product given{
      weight, lora_a, lora_b,    rank,   scaling, offs,    x_rows, mask_rows, {dropout_p, seed},
      first,  y,      workspace, tables, t,       adapters};
  const int64_t count = count_of(x, x_rows);
  check(given, x, count, given.out_features());
  const std::array<int64_t, 2> sizes{given.experts(), given.out_features()};
  EXPECT(!bias || (bias->sizes() == at::IntArrayRef(sizes) && bias->device() == x.device() &&
                   (bias->scalar_type() == x.scalar_type() || bias->scalar_type() == at::kFloat)),
         "expected a bias of shape ", at::IntArrayRef(sizes), " in ", x.scalar_type(),
         " or float32");
  Forward out{at::empty({first ? 0 : count, given.out_features()}, x.options()),
              at::empty({first ? 0 : count, rank}, x.options().dtype(at::kFloat))};
  if (kHasData && count != 0) {
    Base base;
    base.weight = weight;
    if (bias) base.bias = bias->contiguous();
    const ForwardArgs args{x, base, update_of(given, count)};
    std::optional<Forward> found = given.is_whole() && !t
                                       ? route::forward(args)
                                       : of_slice(given, args, kernel_route::forward);
    if (found && first == 0) out = *std::move(found);
  }
  return {out.y, out.s, or_empty(out.workspace, x)};
}

template <bool kHasData>
FourTensors experts_product_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& s, const Optional& weights,
    std::array<bool, 3> wanted, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, int64_t rank, double scaling, const at::Tensor& offs,
    const Optional& x_rows, const Optional& grad_rows, const Optional& mask_rows, double dropout_p,
    const Optional& seed, int64_t first, const Optional& dx, const Optional& workspace,
    const Optional& tables, const Optional& slots, int64_t adapters) {
  const Product given{
      weight, lora_a, lora_b,    rank,   scaling, offs,    x_rows, mask_rows, {dropout_p, seed},
      first,  dx,     workspace, tables, {},      adapters};
  const int64_t count = s.size(0);
  check(given, x, count, given.in_features());
  EXPECT(first == 0 || wanted[0], "expected a wanted dx, which further experts alone have");
  check_rows("grad", grad, given.out_features(), given);
  check_numbers("grad_rows", grad_rows, count, x);
  check_height("grad", grad, count);
  EXPECT(count == count_of(x, x_rows) && count == count_of(grad, grad_rows) &&
             s.sizes() == at::IntArrayRef({count, rank}) && s.scalar_type() == at::kFloat &&
             s.is_contiguous(),
         "expected contiguous s of shape [rows, ", rank,
         "] in float32 for rows of x and grad, but got ", s.scalar_type(), " of ", s.sizes());
  const auto is_known = [&](at::ScalarType type) {
    return type == at::kFloat || type == x.scalar_type();
  };
  EXPECT(!weights || (is_known(weights->scalar_type()) && weights->is_contiguous() &&
                      weights->sizes() == at::IntArrayRef(count)),
         "expected contiguous weights of float32 or ", x.scalar_type(), ", one for each of the ",
         count, " rows");
  check_numbers("slots", slots, count, x);
  if (kHasData && count != 0 && (wanted[0] || wanted[1] || wanted[2])) {
    Base base;
    base.weight = weight;
    const BackwardArgs args{grad, x,
                            base, update_of(given, count, grad_rows, weights, slots),
                            s,    Wanted::one(wanted[0], wanted[1], wanted[2])};
    const std::optional<Backward> out =
        given.is_whole() ? route::backward(args) : of_slice(given, args, kernel_route::backward);
    if (out && first == 0)
      return {out->dx, out->dlora_a[0], out->dlora_b[0], or_empty(out->workspace, x)};
    wanted = {};
  }
  const auto made = [&](bool wants, int64_t rows, int64_t columns, at::ScalarType dtype) {
    return wants ? at::zeros({rows, columns}, x.options().dtype(dtype)) : at::Tensor();
  };
  const at::ScalarType factors = given.float_adapters() ? at::kFloat : x.scalar_type();
  const int64_t ranks = rank * given.groups();
  return {made(wanted[0], count, given.in_features(), x.scalar_type()),
          made(wanted[1], ranks, given.in_features(), factors),
          made(wanted[2], given.out_features(), ranks, factors), or_empty({}, x)};
}

template <bool kHasData>
void register_product(torch::Library& m) {
  m.impl("experts_product", TORCH_FN(experts_product<kHasData>));
  m.impl("experts_product_backward", TORCH_FN(experts_product_backward<kHasData>));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // (y [S, N], s [S, r] in float32, the kernels' workspace). lora_a [E, C, K] and lora_b [E, N, C] are
  // experts_factors' pools, offs and rows those of experts_routes; a row of no expert is zero in y.
  // Tables are experts_routes', too, or made. The workspace is empty if no kernels ran, and of a slice
  // or with t, experts_low_rank's, nothing is computed then. A slice whose `first` is not 0 has empty
  // results: it writes its rows into y. Where a row has one of n adapters or none, `adapters` is
  // n + 1: pools and offs have so many groups of each expert, side by side.
  m.def(
      "experts_product(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, "
      "int rank, float scaling, Tensor offs, Tensor? x_rows, Tensor? mask_rows, float dropout_p, "
      "Tensor? seed, int first=0, Tensor(a!)? y=None, Tensor(b!)? workspace=None, "
      "Tensor? tables=None, Tensor? t=None, int adapters=1) -> (Tensor, Tensor, Tensor)",
      tags);
  // (dx [S, K], dA [E r, K], dB [N, r E], those that are wanted; the workspace). weights [S] are
  // of the rows in dA and dB; with slots, int32 [S], each row's is by its slot. Slices are as in
  // forward, and all want the same.
  m.def(
      "experts_product_backward(Tensor grad, Tensor x, Tensor s, Tensor? weights, bool[3] wanted, "
      "Tensor weight, Tensor lora_a, Tensor lora_b, int rank, float scaling, Tensor offs, "
      "Tensor? x_rows, Tensor? grad_rows, Tensor? mask_rows, float dropout_p, Tensor? seed, "
      "int first=0, Tensor(a!)? dx=None, Tensor(b!)? workspace=None, Tensor? tables=None, "
      "Tensor? slots=None, int adapters=1) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_product<true>(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_product<true>(m); }
TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { register_product<false>(m); }

}  // namespace lora_ext
