#include "route/grouped_route.h"

#include "library/grouped_library_route.h"
#include "route/cpu_grouped_route.h"

namespace lora_ext::route {

GroupedForward forward(GroupedForwardArgs args) {
  std::optional<at::Tensor>& bias = args.base.bias;
  if (bias) bias = bias->to(args.x.scalar_type());
  return args.x.is_cpu() ? cpu::forward(args) : library_route::forward(args);
}

GroupedBackward backward(const GroupedBackwardArgs& args) {
  return args.x.is_cpu() ? cpu::backward(args) : library_route::backward(args);
}

}  // namespace lora_ext::route
