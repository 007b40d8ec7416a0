#include "op/route/route.h"

#include "cpu/driver.h"
#include "op/launch/kernel_launch.h"
#include "op/library/library_route.h"
#include "op/route/equal_blocks.h"
#include "op/route/kernel_route.h"

namespace lora_ext::route {

Forward forward(ForwardArgs args) {
  if (args.base.row_block > 0) return forward_in_blocks(args);
  std::optional<at::Tensor>& bias = args.base.bias;
  if (kernel_launch::has_kernels(args.x.device())) {
    if (bias) bias = bias->contiguous();
    if (std::optional<Forward> out = kernel_route::forward(args)) return *std::move(out);
  }
  if (bias) bias = bias->to(args.x.scalar_type());
  if (args.x.is_cpu()) {
    if (std::optional<Forward> out = cpu::forward(args)) return *std::move(out);
  }
  return library_route::forward(args);
}

Backward backward(const BackwardArgs& args) {
  if (args.base.row_block > 0) return backward_in_blocks(args);
  if (kernel_launch::has_kernels(args.x.device())) {
    if (std::optional<Backward> out = kernel_route::backward(args)) return *std::move(out);
  }
  if (args.x.is_cpu()) {
    if (std::optional<Backward> out = cpu::backward(args)) return *std::move(out);
  }
  return library_route::backward(args);
}

}  // namespace lora_ext::route
