// Schemas of the torch library `lora_ext`.
#include <torch/library.h>

#include <string>

namespace lora_ext {
namespace {

// The base is a weight [N, K], or a y [..., N] that another module returned. FACTOR is Tensor for
// one adapter; or Tensor[] for a list of one, and with kGroups for a list of many or a pool.
std::string operands(const std::string& factor) {
  return "Tensor x, Tensor? weight, Tensor? y, " + factor + " lora_a, " + factor +
         " lora_b, float scaling=1.0, Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, "
         "SymInt row_offset=0, SymInt col_offset=0, bool cast_weight=False, Tensor? packed=None, "
         "Tensor? packed_t=None, int row_block=0";
}

constexpr char kGroups[] =
    ", Tensor? scalings=None, Tensor? index=None, Tensor? offs=None, Tensor? ranks=None";

}  // namespace

// lora and lora_grouped are the public ops: pure in (seed, row_offset, col_offset), differentiable
// in x, lora_a, lora_b and bias or y. lora_forward and lora_backward are what their autograd
// Function calls.
TORCH_LIBRARY(lora_ext, m) {
  m.set_python_module("lora_ext");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string grouped = operands("Tensor[]") + kGroups;
  m.def(("lora(" + operands("Tensor") + ") -> Tensor").c_str(), tags);
  m.def(("lora_grouped(" + grouped + ") -> Tensor").c_str(), tags);
  m.def(("lora_forward(" + grouped + ") -> (Tensor y, Tensor s)").c_str(), tags);
  const std::string backward =
      "lora_backward(Tensor grad, Tensor s, bool[2] wanted, bool[] wanted_a, bool[] wanted_b, " +
      grouped + ") -> (Tensor, Tensor[], Tensor[], Tensor)";
  m.def(backward.c_str(), tags);
  m.def(
      "dropout_mask(Tensor seed, SymInt rows, SymInt cols, float dropout_p, SymInt row_offset=0, "
      "SymInt col_offset=0) -> Tensor",
      tags);
}

}  // namespace lora_ext
