// Current stream and device through c10's virtual guard: no CUDA header of torch, no libc10_cuda,
// so that one source links against a CPU torch and a CUDA torch alike.
#include "op/library/dropout_launch.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "common/check.h"
#include "kernels/dropout.h"

namespace lora_ext::cuda {
namespace {

Element element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Element::kFloat64;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      return Element::kFloat32;
  }
}

void run(Element element, const at::Tensor& out, const DropoutParams& params) {
  const c10::DeviceGuard device(out.device());
  const c10::impl::VirtualGuardImpl guard(out.device().type());
  void* stream = guard.getStream(out.device()).native_handle();
  const std::string error = launch_dropout(element, params, stream);
  LORA_EXT_CHECK(error.empty(), "launching dropout on ", out.device(), " failed: ", error);
}

DropoutParams params_of(const at::Tensor& out, const DropoutArgs& dropout, int64_t first_row) {
  DropoutParams params{};
  params.out = out.mutable_data_ptr();
  params.rows = out.size(0);
  params.cols = out.size(1);
  params.out_pitch = out.stride(0);
  params.seed = dropout.seed->const_data_ptr<int64_t>();
  params.row_offset = dropout.first_row() + first_row;
  params.col_offset = dropout.first_col();
  params.keep_count = dropout.keep_count();
  params.keep_scale = dropout.keep_scale();
  return params;
}

}  // namespace

void drop(const at::Tensor& x, at::Tensor& out, const DropoutArgs& dropout, int64_t first_row) {
  DropoutParams params = params_of(out, dropout, first_row);
  params.x = x.const_data_ptr();
  params.x_pitch = x.stride(0);
  run(element_of(x.scalar_type()), out, params);
}

void dropout_mask(at::Tensor& mask, const DropoutArgs& dropout) {
  run(Element::kMask, mask, params_of(mask, dropout, 0));
}

}  // namespace lora_ext::cuda
