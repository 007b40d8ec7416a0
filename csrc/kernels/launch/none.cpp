// The device library of a build without CUDA: it has no kernels; every function reports that.
#include "kernels/dequantize.h"
#include "kernels/device.h"
#include "kernels/dropout.h"
#include "kernels/lora_experts.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {
namespace {

constexpr char kNone[] = "this build has no CUDA kernels; lora_ext.build_info() says why";

}  // namespace

bool is_built() { return false; }
bool has_kernels(bool) { return false; }
plan::Card card_of(int) {
  plan::Card card{};
  card.error = kNone;
  return card;
}
std::string driver() { return "none"; }
bool is_capturing(void*) { return false; }
std::optional<uint64_t> stream_id(void*) { return std::nullopt; }
uint32_t* permanent_zeros(int64_t, void*) { return nullptr; }
std::optional<std::string> wait(void*, double) { return kNone; }

template <class Operands>
std::string launch_lora(Dtype, const plan::Plan&, const Operands&, void*) {
  return kNone;
}
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraLinearForward&, void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraLinearBackward&,
                                 void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraGroupedForward&,
                                 void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraGroupedBackward&,
                                 void*);
std::string launch_dropout(Dtype, const DropoutParams&, void*) { return kNone; }
std::string launch_dequantize(Dtype, const kernel::DequantizeParams&, void*) { return kNone; }
std::string launch_experts(Dtype, const kernel::ExpertsParams&, void*) { return kNone; }

}  // namespace lora_ext::cuda
