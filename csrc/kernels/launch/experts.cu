// The instances and launches of the kernels around the products of a mixture's experts.
#include "kernels/experts/launch.h"
#include "kernels/launch/stream_launch.h"
#include "kernels/lora_experts.h"

namespace lora_ext::cuda {

std::string launch_experts(Dtype dtype, const kernel::ExpertsParams& params, void* stream) {
  StreamLaunch run(static_cast<cudaStream_t>(stream));
  const bool known = with_type<__nv_bfloat16, __half>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    std::visit([&](const auto& own) { kernel::enqueue<T>(run, own); }, params);
  });
  return text_of(known ? run.error() : cudaErrorInvalidValue);
}

}  // namespace lora_ext::cuda
