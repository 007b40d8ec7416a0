// Schemas of the torch library `lora_ext`, and calls of its ops through the dispatcher.
#include "op/ops.h"

#include <string>

namespace lora_ext {
namespace {

// The base is a weight [N, K], or a y [..., N] that another module returned.
constexpr char kInputs[] = "Tensor x, Tensor? weight, Tensor? y, ";
constexpr char kOneAdapter[] = "Tensor lora_a, Tensor lora_b, float scaling=1.0, ";
// A list of matrices or one pool each; index or offs says which adapter a row has.
constexpr char kManyAdapters[] =
    "Tensor[] lora_a, Tensor[] lora_b, Tensor scaling, Tensor? index=None, Tensor? offs=None, "
    "Tensor? ranks=None, ";
constexpr char kRest[] =
    "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, SymInt row_offset=0, "
    "SymInt col_offset=0, bool cast_weight=False, Tensor? packed=None, Tensor? packed_t=None, "
    "int row_block=0";

}  // namespace

// lora and lora_grouped are the public ops: pure in (seed, row_offset, col_offset), differentiable
// in x, lora_a, lora_b and bias or y. Their autograd Function calls the others.
TORCH_LIBRARY(lora_ext, m) {
  m.set_python_module("lora_ext");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  const std::string one = std::string(kInputs) + kOneAdapter + kRest;
  const std::string many = std::string(kInputs) + kManyAdapters + kRest;
  define("lora(" + one + ") -> Tensor");
  define("lora_grouped(" + many + ") -> Tensor");
  define("lora_forward(" + one + ") -> (Tensor y, Tensor s)");
  define("lora_grouped_forward(" + many + ") -> (Tensor y, Tensor s)");
  define("lora_backward(Tensor grad, Tensor s, bool[4] wanted, " + one +
         ") -> (Tensor, Tensor, Tensor, Tensor)");
  define(
      "lora_grouped_backward(Tensor grad, Tensor s, bool[2] wanted, bool[] wanted_a, "
      "bool[] wanted_b, " +
      many + ") -> (Tensor, Tensor[], Tensor[], Tensor)");
}

namespace {

template <class Op>
auto find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<decltype(Op::template flat<nullptr>)>();
}

c10::List<bool> to_list(const NeedsGrad& wishes) {
  c10::List<bool> list;
  for (const bool wish : wishes) list.push_back(wish);
  return list;
}

std::vector<at::Tensor> to_list(const at::Tensor& gradient, bool wanted) {
  return wanted ? std::vector<at::Tensor>{gradient} : std::vector<at::Tensor>();
}

}  // namespace

namespace ops {

at::Tensor lora(const at::Tensor& x, const Base& base, const Update& update) {
  static const auto one = find<Lora>("lora_ext::lora");
  static const auto many = find<LoraGrouped>("lora_ext::lora_grouped");
  return update.is_one() ? Lora::call(one, x, base, update)
                         : LoraGrouped::call(many, x, base, update);
}

YAndS lora_forward(const at::Tensor& x, const Base& base, const Update& update) {
  static const auto one = find<LoraForward>("lora_ext::lora_forward");
  static const auto many = find<LoraGroupedForward>("lora_ext::lora_grouped_forward");
  return update.is_one() ? LoraForward::call(one, x, base, update)
                         : LoraGroupedForward::call(many, x, base, update);
}

Gradients lora_backward(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                        const at::Tensor& x, const Base& base, const Update& update) {
  static const auto one = find<LoraBackward>("lora_ext::lora_backward");
  static const auto many = find<LoraGroupedBackward>("lora_ext::lora_grouped_backward");
  if (!update.is_one()) {
    return LoraGroupedBackward::call(many, grad, s, {wanted.dx, wanted.dbias},
                                     to_list(wanted.dlora_a), to_list(wanted.dlora_b), x, base,
                                     update);
  }
  const bool want_a = wanted.any_a(), want_b = wanted.any_b();
  const auto [dx, da, db, dbias] =
      LoraBackward::call(one, grad, s, {wanted.dx, want_a, want_b, wanted.dbias}, x, base, update);
  return {dx, to_list(da, want_a), to_list(db, want_b), dbias};
}

}  // namespace ops
}  // namespace lora_ext
