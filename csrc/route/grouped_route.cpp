#include "route/grouped_route.h"

#include "launch/kernel_launch.h"
#include "library/grouped_library_route.h"
#include "route/cpu_grouped_route.h"
#include "route/kernel_route.h"

namespace lora_ext::route {

GroupedForward forward(GroupedForwardArgs args) {
  std::optional<at::Tensor>& bias = args.base.bias;
  if (kernel_launch::has_kernels(args.x.device())) {
    if (bias) bias = bias->contiguous();
    if (std::optional<GroupedForward> out = kernel_route::forward(args)) return *std::move(out);
  }
  if (bias) bias = bias->to(args.x.scalar_type());
  return args.x.is_cpu() ? cpu::forward(args) : library_route::forward(args);
}

GroupedBackward backward(const GroupedBackwardArgs& args) {
  if (kernel_launch::has_kernels(args.x.device())) {
    if (std::optional<GroupedBackward> out = kernel_route::backward(args)) return *std::move(out);
  }
  return args.x.is_cpu() ? cpu::backward(args) : library_route::backward(args);
}

}  // namespace lora_ext::route
