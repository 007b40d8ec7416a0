#include "route/route.h"

#include "launch/kernel_launch.h"
#include "library/library_route.h"
#include "route/cpu_route.h"
#include "route/equal_blocks.h"
#include "route/kernel_route.h"

namespace lora_ext::route {

Forward forward(ForwardArgs args) {
  if (args.base.row_block > 0) return forward_in_blocks(args);
  std::optional<at::Tensor>& bias = args.base.bias;
  if (kernel_launch::has_kernels(args.x.device())) {
    if (bias) bias = bias->contiguous();
    if (std::optional<Forward> out = kernel_route::forward(args)) return *std::move(out);
  }
  if (bias) bias = bias->to(args.x.scalar_type());
  return args.x.is_cpu() ? cpu::forward(args) : library_route::forward(args);
}

Backward backward(const BackwardArgs& args) {
  if (args.base.row_block > 0) return backward_in_blocks(args);
  if (kernel_launch::has_kernels(args.x.device())) {
    if (std::optional<Backward> out = kernel_route::backward(args)) return *std::move(out);
  }
  return args.x.is_cpu() ? cpu::backward(args) : library_route::backward(args);
}

}  // namespace lora_ext::route
