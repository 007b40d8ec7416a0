// A projection of experts on the CPU in one pass, for rows that are sorted by expert: each row has the
// weight of its expert, and the adapter that an index names, as in lora_grouped. Not differentiable:
// the passes of lora_ext/experts/one_pass.py call it.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "common/check.h"
#include "op/checks.h"
#include "op/ops.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

constexpr char kOp[] = "experts_linear";

// The weights of a call, as its schema has them.
struct ExpertWeights {
  const at::Tensor& weight;               // [E, N, K]
  const std::optional<at::Tensor>& bias;  // [E, N]
  at::IntArrayRef experts, ends;          // the number of an expert, and the end of its rows
};

// rows: [M, C], x or the gradient of y; out: [M, D], what is written.
void check_weights(const ExpertWeights& given, const at::Tensor& rows, const at::Tensor& out) {
  const char* op = kOp;
  const at::Tensor& weight = given.weight;
  const at::ScalarType dtype = rows.scalar_type();
  EXPECT_TYPE(is_half(dtype) || dtype == at::kFloat,
              "expected rows in float32, bfloat16 or float16, but got ", dtype);
  EXPECT(weight.dim() == 3 && weight.is_cpu() && weight.scalar_type() == dtype,
         "expected weight of shape [experts, out_features, in_features] in ", dtype, ", but got ",
         weight.scalar_type(), " of ", weight.sizes());
  for (const at::Tensor* each : {&rows, &out}) {
    EXPECT(each->dim() == 2 && (each->stride(1) == 1 || each->size(1) <= 1) && each->is_cpu() &&
               each->scalar_type() == dtype && each->size(0) == rows.size(0),
           "expected rows and a result of as many in ", dtype,
           ", contiguous along their columns, but got ", each->scalar_type(), " of ",
           each->sizes());
  }
  EXPECT(!given.bias || (given.bias->sizes() == weight.sizes().slice(0, 2) &&
                         given.bias->is_cpu() && given.bias->scalar_type() == dtype),
         "expected a bias of shape ", weight.sizes().slice(0, 2), " in ", dtype);
  EXPECT(given.experts.size() == given.ends.size(), "expected an end of rows for each of the ",
         given.experts.size(), " experts, but got ", given.ends.size());
  int64_t last = 0;
  for (size_t i = 0; i < given.ends.size(); ++i) {
    TORCH_CHECK_INDEX(given.experts[i] >= 0 && given.experts[i] < weight.size(0), "lora_ext.", op,
                      ": expected numbers of experts below ", weight.size(0), ", but got ",
                      given.experts[i]);
    TORCH_CHECK_INDEX(given.ends[i] > last && given.ends[i] <= rows.size(0), "lora_ext.", op,
                      ": expected ends that ascend to the ", rows.size(0), " rows, but got ",
                      given.ends[i], " after ", last);
    last = given.ends[i];
  }
  EXPECT(last == rows.size(0), "expected an expert for each of the ", rows.size(0),
         " rows, but got ", last);
}

cpu::Experts experts_of(const ExpertWeights& given, const at::Tensor& out, const Update& update,
                        const std::optional<at::Tensor>& mask_rows, int64_t rows) {
  const char* op = kOp;
  EXPECT(update.lora_a.empty() || update.dropout.p == 0.0 ||
             (mask_rows && mask_rows->scalar_type() == at::kLong && mask_rows->is_contiguous() &&
              mask_rows->is_cpu() && mask_rows->numel() == rows),
         "expected mask_rows of int64, one for each of the ", rows, " rows, beside dropout");
  cpu::Experts experts{{}, out, mask_rows};
  int64_t begin = 0;
  for (size_t i = 0; i < given.experts.size(); ++i) {
    experts.rows.push_back({given.experts[i], begin, given.ends[i]});
    begin = given.ends[i];
  }
  return experts;
}

Update update_of(at::TensorList lora_a, at::TensorList lora_b,
                 const std::optional<at::Tensor>& scaling, const std::optional<at::Tensor>& index,
                 const std::optional<at::Tensor>& offs, double dropout_p,
                 const std::optional<at::Tensor>& seed) {
  return {{lora_a.begin(), lora_a.end()},
          {lora_b.begin(), lora_b.end()},
          1.0,
          {dropout_p, seed},
          Grouping{scaling.value_or(at::Tensor()), index, offs}};
}

at::Tensor experts_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef experts, at::IntArrayRef ends, at::TensorList lora_a, at::TensorList lora_b,
    const std::optional<at::Tensor>& scaling, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offs, double dropout_p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& mask_rows, int64_t row_block, at::Tensor& y) {
  const char* op = kOp;
  const ExpertWeights given{weight, bias, experts, ends};
  check_weights(given, x, y);
  EXPECT(x.size(1) == weight.size(2) && y.size(1) == weight.size(1), "expected x and y of ",
         weight.size(2), " and ", weight.size(1), " columns, but got ", x.sizes(), " and ",
         y.sizes());
  const Update update = update_of(lora_a, lora_b, scaling, index, offs, dropout_p, seed);
  const at::Tensor no_s = at::empty({x.size(0), 0}, x.options().dtype(at::kFloat));
  if (lora_a.empty() && (x.numel() == 0 || y.numel() == 0)) return no_s;
  if (!lora_a.empty()) check_forward(x, Base::given(y), update);
  const Forward out = route::forward(op, {x, {weight, bias, false, {}, {}, row_block}, update},
                                     experts_of(given, y, update, mask_rows, x.size(0)));
  return lora_a.empty() ? no_s : out.s;
}

// A gradient is written for each factor or for none.
void check_gradients(at::TensorList gradients, at::TensorList factors) {
  const char* op = kOp;
  EXPECT(gradients.empty() || gradients.size() == factors.size(),
         "expected a gradient for each of the ", factors.size(), " factors or none, but got ",
         gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    EXPECT(gradients[i].sizes() == factors[i].sizes() && gradients[i].is_cpu() &&
               gradients[i].scalar_type() == factors[i].scalar_type(),
           "expected a gradient of shape ", factors[i].sizes(), " in ", factors[i].scalar_type(),
           ", but got ", gradients[i].scalar_type(), " of ", gradients[i].sizes());
  }
}

void experts_linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& s,
                             const at::Tensor& weight, at::IntArrayRef experts,
                             at::IntArrayRef ends, at::TensorList lora_a, at::TensorList lora_b,
                             const std::optional<at::Tensor>& scaling,
                             const std::optional<at::Tensor>& index,
                             const std::optional<at::Tensor>& offs, double dropout_p,
                             const std::optional<at::Tensor>& seed,
                             const std::optional<at::Tensor>& mask_rows, int64_t row_block,
                             const std::optional<at::Tensor>& dx, at::TensorList dlora_a,
                             at::TensorList dlora_b, const std::optional<at::Tensor>& weights) {
  const char* op = kOp;
  const ExpertWeights given{weight, std::nullopt, experts, ends};
  check_weights(given, grad, dx.value_or(grad));
  const std::array<int64_t, 2> shape{grad.size(0), weight.size(2)};
  EXPECT(x.sizes() == at::IntArrayRef(shape) && grad.size(1) == weight.size(1) &&
             (!dx || dx->sizes() == x.sizes()),
         "expected x and dx of ", weight.size(2), " columns and a gradient of ", weight.size(1),
         ", but got ", x.sizes(), " and ", grad.sizes());
  // For other gradients what x holds is not read.
  EXPECT(x.is_cpu() && x.scalar_type() == grad.scalar_type() &&
             (dlora_a.empty() || x.stride(1) == 1 || x.size(1) <= 1),
         "expected x in ", grad.scalar_type(), ", contiguous along its columns, but got ",
         x.scalar_type(), " of strides ", x.strides());
  EXPECT(s.is_contiguous(), "expected a contiguous s, but got strides ", s.strides());
  EXPECT(!weights || (weights->scalar_type() == at::kFloat && weights->is_contiguous() &&
                      weights->is_cpu() && weights->numel() == x.size(0)),
         "expected contiguous weights of float32, one for each of the ", x.size(0), " rows");
  if (lora_a.empty() && (!dx || grad.numel() == 0 || dx->numel() == 0)) return;
  check_gradients(dlora_a, lora_a), check_gradients(dlora_b, lora_b);
  const Update update = update_of(lora_a, lora_b, scaling, index, offs, dropout_p, seed);
  const Wanted wanted{dx.has_value(), NeedsGrad(lora_a.size(), !dlora_a.empty()),
                      NeedsGrad(lora_b.size(), !dlora_b.empty())};
  if (!lora_a.empty()) check_backward(grad, s, wanted, x, Base::given(), update);
  cpu::Experts own = experts_of(given, dx.value_or(at::Tensor()), update, mask_rows, x.size(0));
  own.da = {dlora_a.begin(), dlora_a.end()}, own.db = {dlora_b.begin(), dlora_b.end()};
  own.weights = weights;
  route::backward(op, {grad, x, {weight, {}, false, {}, {}, row_block}, update, s, wanted}, own);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  // Writes y and returns S.
  m.def(
      "experts_linear(Tensor x, Tensor weight, Tensor? bias, int[] experts, int[] ends, "
      "Tensor[] lora_a, Tensor[] lora_b, Tensor? scaling, Tensor? index, Tensor? offs, "
      "float dropout_p, Tensor? seed, Tensor? mask_rows, int row_block, Tensor(a!) y) -> Tensor");
  // Writes dx, if there is one, and the gradients of lora_a and of lora_b, or of none. weights
  // multiply the rows in the gradient of lora_a alone.
  m.def(
      "experts_linear_backward(Tensor grad, Tensor x, Tensor s, Tensor weight, int[] experts, "
      "int[] ends, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor? scaling, Tensor? index, Tensor? offs, float dropout_p, Tensor? seed, "
      "Tensor? mask_rows, int row_block, Tensor(a!)? dx, Tensor(b!)[] dlora_a, "
      "Tensor(c!)[] dlora_b, Tensor? weights=None) -> ()");
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("experts_linear", TORCH_FN(experts_linear));
  m.impl("experts_linear_backward", TORCH_FN(experts_linear_backward));
}

}  // namespace lora_ext
