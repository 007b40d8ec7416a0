#include "kernels/launch/driver.h"
#include "kernels/launch/instances.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {

template <class Operands>
std::string launch_lora(Dtype dtype, const plan::Plan& plan, const Operands& operands,
                        void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  const bool known = with_type<__nv_bfloat16, __half>(dtype, [&](auto type) {
    kernel::launch_lora<typename decltype(type)::type>(plan, operands, launch);
  });
  return text_of(known ? launch.error() : cudaErrorInvalidValue);
}
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraLinearForward&, void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraLinearBackward&,
                                 void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraGroupedForward&,
                                 void*);
template std::string launch_lora(Dtype, const plan::Plan&, const kernel::LoraGroupedBackward&,
                                 void*);

}  // namespace lora_ext::cuda
