// The ops that lora_ext/experts uses on the CPU besides lora_grouped: a projection of experts that
// have few rows each; and copying B of some experts into a pool, or the gradient of a pool into
// that of B. Neither is differentiable: the passes of lora_ext/experts/projection.py call them.
#include <torch/library.h>

#include <array>

#include "common/check.h"
#include "op/checks.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

void check_below(const char* op, const char* what, at::IntArrayRef numbers, int64_t limit) {
  for (const int64_t number : numbers) {
    TORCH_CHECK_INDEX(number >= 0 && number < limit, "lora_ext.", op, ": expected numbers of ",
                      what, " below ", limit, ", but got ", number);
  }
}

// int64 numbers in one dimension, on the CPU.
at::IntArrayRef numbers_of(const char* op, const char* name, const at::Tensor& numbers) {
  EXPECT(numbers.scalar_type() == at::kLong && numbers.dim() == 1 && numbers.is_contiguous() &&
             numbers.is_cpu(),
         "expected ", name, " of int64 and one dimension, but got ", numbers.scalar_type(), " of ",
         numbers.sizes());
  return {numbers.const_data_ptr<int64_t>(), static_cast<size_t>(numbers.numel())};
}

void check_token(const char* op, const ExpertsArgs& args) {
  if (!args.token) {
    EXPECT(args.x.size(0) == args.rows(), "expected ", args.rows(),
           " rows of x, one for each expert named, but got ", args.x.sizes());
    return;
  }
  const at::IntArrayRef tokens = numbers_of(op, "token", *args.token);
  EXPECT(static_cast<int64_t>(tokens.size()) == args.rows(), "expected ", args.rows(),
         " tokens, one for each expert named, but got ", tokens.size());
  check_below(op, "tokens", tokens, args.x.size(0));
}

void check_adapters(const char* op, const ExpertsArgs& args) {
  if (!args.adapters) return;
  EXPECT(args.adapters->size() == args.experts.size(), "expected ", args.rows(),
         " adapters, one for each expert named, but got ", args.adapters->size());
  const auto count = static_cast<int64_t>(args.lora_a.size());
  for (const int64_t adapter : *args.adapters) {
    TORCH_CHECK_INDEX(adapter >= -1 && adapter < count, "lora_ext.", op,
                      ": expected numbers of adapters from -1 (none) to ", count - 1, ", but got ",
                      adapter);
  }
}

void check_matrix(const char* op, const char* name, const at::Tensor& factor,
                  at::IntArrayRef shape) {
  const at::ScalarType dtype = factor.scalar_type();
  EXPECT_TYPE(is_half(dtype) || dtype == at::kFloat, "expected ", name,
              " in float32, bfloat16 or float16, but got ", dtype);
  EXPECT(factor.sizes() == shape && factor.is_contiguous() && factor.is_cpu(), "expected ", name,
         " contiguous, of shape ", shape, ", but got ", factor.sizes());
}

// One tensor of the numbers by which codes become values.
void check_part(const char* op, const char* name, const std::optional<at::Tensor>& given,
                at::ScalarType dtype, int64_t count) {
  EXPECT(given.has_value(), "expected a ", name, " beside codes of 4 bits, but got none");
  const at::Tensor& part = *given;
  EXPECT(
      part.scalar_type() == dtype && part.numel() == count && part.is_contiguous() && part.is_cpu(),
      "expected a contiguous ", name, " of ", count, " elements in ", dtype, ", but got ",
      part.scalar_type(), " of ", part.sizes());
}

void check_codes(const char* op, const ExpertsArgs& args) {
  const at::Tensor& codes = args.weight;
  const FourBitBlocks& blocks = *args.blocks;
  EXPECT(codes.scalar_type() == at::kByte && codes.dim() == 3 && codes.size(0) > 0 &&
             codes.is_contiguous() && codes.is_cpu(),
         "expected contiguous codes of shape [experts, out_features, in_features / 2] in uint8, but"
         " got ",
         codes.scalar_type(), " of ", codes.sizes());
  EXPECT_TYPE(is_half(args.x.scalar_type()), "expected x in bfloat16 or float16, but got ",
              args.x.scalar_type());
  const int64_t block = blocks.block, count = 2 * codes.numel();
  EXPECT(block > 0 && block % 2 == 0 && args.in_features() % block == 0,
         "expected an even block that divides the ", args.in_features(),
         " input features, but got ", block);
  check_part(op, "scale", blocks.scale, blocks.is_nested() ? at::kByte : at::kFloat, count / block);
  check_part(op, "table", blocks.table, at::kFloat, 16);
  if (!blocks.is_nested()) return;
  EXPECT(blocks.scale_block > 0, "expected a positive scale_block, but got ", blocks.scale_block);
  const int64_t some = (count / block + blocks.scale_block - 1) / blocks.scale_block;
  check_part(op, "scale_table", blocks.scale_table, at::kFloat, 256);
  check_part(op, "scale_scale", blocks.scale_scale, at::kFloat, some);
  check_part(op, "scale_offset", blocks.scale_offset, at::kFloat, 1);
}

void check_values(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  EXPECT(weight.dim() == 3 && weight.size(0) > 0 && weight.is_cpu() &&
             (weight.stride(1) == 1 || weight.stride(2) == 1),
         "expected weight of shape [experts, out_features, in_features], one of the last two of"
         " stride 1, but got ",
         weight.sizes());
  EXPECT_TYPE(is_half(weight.scalar_type()) && x.scalar_type() == weight.scalar_type(),
              "expected x and weight both in bfloat16 or in float16, but got ", x.scalar_type(),
              " and ", weight.scalar_type());
}

void check_few_rows(const char* op, const ExpertsArgs& args) {
  const at::Tensor &x = args.x, &weight = args.weight;
  if (args.blocks) {
    check_codes(op, args);
  } else {
    check_values(op, x, weight);
  }
  const int64_t experts = weight.size(0), out = weight.size(1), in = args.in_features();
  EXPECT(x.dim() == 2 && x.size(1) == in && x.stride(1) == 1 && x.is_cpu(),
         "expected x of shape [rows, ", in, "], contiguous along its columns, but got ", x.sizes());
  check_below(op, "experts", args.experts, experts);
  check_token(op, args);
  if (args.bias) check_matrix(op, "bias", *args.bias, {experts, out});
  const size_t adapters = args.lora_a.size();
  EXPECT(args.lora_b.size() == adapters && args.scalings.size() == adapters,
         "expected as many of lora_a, lora_b and scalings, but got ", adapters, ", ",
         args.lora_b.size(), " and ", args.scalings.size());
  for (size_t i = 0; i < adapters; ++i) {
    EXPECT(args.lora_a[i].dim() == 2, "expected lora_a of shape [experts r, in_features], but got ",
           args.lora_a[i].sizes());
    const int64_t rank = args.rank_of(i);
    check_matrix(op, "lora_a", args.lora_a[i], {experts * rank, in});
    check_matrix(op, "lora_b", args.lora_b[i], {out, rank * experts});
  }
  check_adapters(op, args);
}

std::tuple<at::Tensor, at::Tensor> experts_few_rows(
    const at::Tensor& x, const std::optional<at::Tensor>& token, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, at::TensorList lora_a, at::TensorList lora_b,
    at::ArrayRef<double> scalings, at::IntArrayRef experts, at::OptionalIntArrayRef adapters,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& table, bool low_first,
    int64_t block, const std::optional<at::Tensor>& scale_table,
    const std::optional<at::Tensor>& scale_scale, const std::optional<at::Tensor>& scale_offset,
    int64_t scale_block) {
  std::optional<FourBitBlocks> blocks;
  if (scale) {
    blocks = FourBitBlocks{*scale,      table,       low_first,    block,
                           scale_table, scale_scale, scale_offset, scale_block};
  }
  ExpertsArgs args{
      x, token, weight, blocks, bias, lora_a.vec(), lora_b.vec(), scalings.vec(), experts.vec()};
  if (adapters) args.adapters = adapters->vec();
  check_few_rows("experts_few_rows", args);
  const Forward out = route::forward_of_few_rows("experts_few_rows", args);
  return {out.y, out.s};
}

void experts_copy(at::Tensor& out, const at::Tensor& source, const at::Tensor& hit,
                  int64_t experts) {
  const char* op = "experts_copy";
  const at::Tensor &lora_b = out.dim() == 3 ? source : out, &pool = out.dim() == 3 ? out : source;
  EXPECT(experts > 0 && lora_b.dim() == 2 && lora_b.size(1) % experts == 0 &&
             lora_b.is_contiguous() && lora_b.is_cpu(),
         "expected a contiguous lora_b of shape [out_features, r ", experts, "], but got ",
         lora_b.sizes());
  check_supported(op, "lora_b", lora_b.scalar_type());
  check_below(op, "experts", numbers_of(op, "hit", hit), experts);
  const std::array<int64_t, 3> shape{hit.numel(), lora_b.size(0), lora_b.size(1) / experts};
  EXPECT(pool.sizes() == at::IntArrayRef(shape) && pool.is_contiguous() &&
             pool.scalar_type() == lora_b.scalar_type() && pool.is_cpu(),
         "expected a contiguous pool of lora_b's dtype and shape ", at::IntArrayRef(shape),
         ", but got ", pool.scalar_type(), " of ", pool.sizes());
  cpu::experts_copy(out, source, hit, experts);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "experts_few_rows(Tensor x, Tensor? token, Tensor weight, Tensor? bias, Tensor[] lora_a, "
      "Tensor[] lora_b, float[] scalings, int[] experts, int[]? adapters=None, *, "
      "Tensor? scale=None, Tensor? table=None, bool low_first=False, int block=0, "
      "Tensor? scale_table=None, "
      "Tensor? scale_scale=None, Tensor? scale_offset=None, int scale_block=0) -> (Tensor, "
      "Tensor)");
  // Between lora_b and a pool, which has 3 dimensions.
  m.def("experts_copy(Tensor(a!) out, Tensor source, Tensor hit, int experts) -> ()");
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("experts_few_rows", TORCH_FN(experts_few_rows));
  m.impl("experts_copy", TORCH_FN(experts_copy));
}

}  // namespace lora_ext
