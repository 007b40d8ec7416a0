#ifdef LORA_EXT_WITH_CUDA
#include "kernel_check.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include <map>
#include <mutex>
#include <tuple>

#include "kernel_launch.h"
#include "library_route.h"

namespace lora_ext::kernel_check {
namespace {

constexpr char kNotYet[] = "not yet";

struct Results {
  std::mutex mutex;
  std::map<std::tuple<int, Kernels>, std::string> by_kernels;
};
Results& results() {
  static Results all;
  return all;
}

// Scattered numbers in (-size, size) that are no one's random numbers: torch's generator must stay
// as it is.
at::Tensor numbers(at::IntArrayRef shape, double step, double size, const at::TensorOptions& like) {
  const int64_t count = c10::multiply_integers(shape);
  const at::Tensor scattered = at::arange(count, like.dtype(at::kFloat)).mul_(step).sin_();
  return scattered.mul_(43758.5).frac_().mul_(size).view(shape).to(like.dtype());
}

// "" or what differs. The routes round in different places: a result is wrong if it is off by eight
// roundings of the largest element, or by 2^-12 of it where adapters and result are float.
std::string compare(const char* what, const at::Tensor& got, const at::Tensor& expected,
                    const Kernels& kernels) {
  const bool wide = kernels.float_adapters && got.scalar_type() == at::kFloat;
  const double relative = wide ? 0x1p-12 : kernels.float16 ? 0x1p-8 : 0x1p-5;
  const at::Tensor difference = got.to(at::kDouble).sub_(expected.to(at::kDouble)).abs_();
  const double allowed = relative * expected.abs().max().to(at::kDouble).item<double>();
  const double worst = difference.max().item<double>();
  if (worst <= allowed) return "";  // NaN is not
  return std::string(what) + " differs from the library route by " + std::to_string(worst) +
         ", more than " + std::to_string(allowed);
}

std::string compare_all(const Forward& got, const Forward& expected, const Kernels& kernels) {
  const std::string y = compare("y", got.y, expected.y, kernels);
  return y.empty() ? compare("s", got.s, expected.s, kernels) : y;
}
std::string compare_all(const Backward& got, const Backward& expected, const Kernels& kernels) {
  const std::string dx = compare("dx", got.dx, expected.dx, kernels);
  if (!dx.empty()) return dx;
  const std::string da = compare("dlora_a", got.dlora_a, expected.dlora_a, kernels);
  if (!da.empty() || !got.dlora_b.defined()) return da;
  return compare("dlora_b", got.dlora_b, expected.dlora_b, kernels);
}

template <class Args>
std::string run_case(const plan::Card& card, const Kernels& kernels, const plan::Request& request,
                     const Args& args) {
  const kernel_set::SmallCase small{kernel_launch::problem_of(args), request};
  const plan::Plan plan = kernel_set::plan_of(card, small, kernels.backward);
  const Kernels planned =
      kernel_set::of_plan(plan, small.problem, kernels.backward, kernels.float16);
  if (planned != kernels) return "the small case takes other kernels: " + planned.name();
  try {
    const auto got = kernel_launch::run(plan, args);
    if constexpr (std::is_same_v<Args, ForwardArgs>) {
      return compare_all(got, library_route::forward(args), kernels);
    } else {
      return compare_all(got, library_route::backward(args), kernels);
    }
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string run_small_case(const at::Device& device, const plan::Card& card,
                           const Kernels& kernels) {
  const kernel_set::SmallCase small = kernel_set::small_case(kernels);
  const plan::Problem& problem = small.problem;
  const int64_t m = problem.m, n = problem.n, k = problem.k, rank = problem.rank;
  const at::ScalarType dtype = kernels.float16 ? at::kHalf : at::kBFloat16;
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const auto adapter = options.dtype(kernels.float_adapters ? at::kFloat : dtype);
  DropoutArgs dropout;
  if (kernels.dropout) {
    dropout.p = 0.25;
    dropout.seed = at::full({}, 7, options.dtype(at::kLong));
  }
  const at::Tensor x = numbers({m, k}, 12.71, 1, options), w = numbers({n, k}, 12.37, 0.1, options);
  const at::Tensor a = numbers({rank, k}, 12.53, 0.1, adapter);
  const at::Tensor b = numbers({n, rank}, 12.29, 0.1, adapter);
  if (!kernels.backward)
    return run_case(card, kernels, small.request,
                    ForwardArgs{x, w, a, b, numbers({n}, 12.9, 1, options), 2.0, dropout, {}});
  const BackwardArgs args{numbers({m, n}, 12.47, 1, options),
                          x,
                          w,
                          a,
                          b,
                          numbers({m, rank}, 12.83, 1, options.dtype(at::kFloat)),
                          2.0,
                          dropout,
                          {},
                          problem.need_dx,
                          problem.need_dlora_a,
                          problem.need_dlora_b};
  return run_case(card, kernels, small.request, args);
}

}  // namespace

std::string result(const at::Device& device, const Kernels& kernels) {
  const std::lock_guard lock(results().mutex);
  const auto found = results().by_kernels.find({device.index(), kernels});
  return found == results().by_kernels.end() ? kNotYet : found->second;
}

std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels) {
  std::string failed;
  {
    const std::lock_guard lock(results().mutex);
    const auto [found, missing] = results().by_kernels.try_emplace({device.index(), kernels});
    if (!missing) return found->second;
    found->second = failed = run_small_case(device, card, kernels);
  }
  if (!failed.empty()) {
    TORCH_WARN("lora_ext: the kernels \"", kernels.name(), "\" failed their check on ", device,
               " and are not used there; the library route is. ", failed);
  }
  return failed;
}

}  // namespace lora_ext::kernel_check
#endif  // LORA_EXT_WITH_CUDA
