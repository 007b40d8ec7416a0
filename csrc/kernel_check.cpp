#ifdef LORA_EXT_WITH_CUDA
#include "kernel_check.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include <map>
#include <mutex>
#include <tuple>

#include "kernel/lora_gemm_sm90a_choice.h"
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
  const double relative = wide ? 0x1p-12 : kernels.dtype == at::kHalf ? 0x1p-8 : 0x1p-5;
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
  return da.empty() ? compare("dlora_b", got.dlora_b, expected.dlora_b, kernels) : da;
}

// The plan of the small case, with the tile that is to be checked.
template <class Args>
std::string run_case(const plan::Card& card, const Kernels& kernels, const Args& args) {
  const plan::Problem problem = kernel_launch::problem_of(args);
  const plan::Choice route = kernels.hybrid ? plan::Choice::kHybrid : plan::Choice::kKernel;
  plan::Request request{route};
  if (!kernels.hybrid) request.tile = kernels.tile;
  request.early_launch = kernels.early;
  const plan::Plan plan = kernels.backward ? plan::backward(card, problem, request)
                                           : plan::forward(card, problem, request);
  const Kernels planned =
      kernels_of(plan, kernels.backward, kernels.dtype, kernels.float_adapters, kernels.dropout);
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

// Columns up to 16, up to 32, and more, with one half of an adapter or two; and the tail.
int64_t rank_for(const Kernels& kernels) {
  if (kernels.one_pass) return !kernels.wide ? 8 : kernels.float_adapters ? 12 : 20;
  const int64_t whole = plan::facts_of(kernels.tile).in_grid ? 0 : 64;
  return kernels.tail == 1 ? whole + 8 : kernels.tail == 2 ? whole + 24 : 40;
}

// Rows, columns and depth that no tile divides, the second wide enough for one pass over dY. An odd
// depth and width make rows unaligned.
std::string run_small_case(const at::Device& device, const plan::Card& card,
                           const Kernels& kernels) {
  const int64_t m = 200, n = kernels.vector ? 536 : 531, k = kernels.vector ? 264 : 259;
  const int64_t rank = rank_for(kernels);
  const auto options = at::TensorOptions().device(device).dtype(kernels.dtype);
  const auto adapter = options.dtype(kernels.float_adapters ? at::kFloat : kernels.dtype);
  DropoutArgs dropout;
  if (kernels.dropout) {
    dropout.p = 0.25;
    dropout.seed = at::full({}, 7, options.dtype(at::kLong));
  }
  const at::Tensor x = numbers({m, k}, 12.71, 1, options), w = numbers({n, k}, 12.37, 0.1, options);
  const at::Tensor a = numbers({rank, k}, 12.53, 0.1, adapter);
  const at::Tensor b = numbers({n, rank}, 12.29, 0.1, adapter);
  if (!kernels.backward)
    return run_case(card, kernels,
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
                          true,
                          true,
                          true};
  return run_case(card, kernels, args);
}

}  // namespace

std::string Kernels::name() const {
  std::string text = backward ? "backward" : "forward";
  text += dtype == at::kHalf ? " float16 " : " bfloat16 ";
  text += hybrid ? "hybrid" : plan::facts_of(tile).name;
  if (!vector) text += " element-wise";
  if (float_adapters) text += " float32 adapters";
  if (dropout) text += " dropout";
  if (one_pass) text += " one pass";
  if (wide) text += " wide";
  if (tail != 0) text += " tail " + std::to_string(tail);
  if (early) text += " early";
  return text;
}

Kernels kernels_of(const plan::Plan& plan, bool backward, at::ScalarType dtype, bool float_adapters,
                   bool dropout) {
  const bool has_gemm = plan.gemm.blocks > 0;  // not where dX is not needed
  const bool wgmma = has_gemm && plan::facts_of(plan.gemm.tile).wgmma;
  return {backward,
          dtype,
          has_gemm ? plan.gemm.tile : plan::Tile::k128x64,
          plan.hybrid,
          plan.vector,
          float_adapters,
          dropout,
          plan.one_pass,
          plan.one_pass && plan.columns > 16,
          wgmma ? kernel::tail_of(plan.width) : 0,
          plan.gemm.early || plan.early_wgrad};
}

// Those with which a call can ask for the kernels. One pass over dY is for few columns.
std::vector<int> tails_of(const Kernels& kernels) {
  if (!plan::facts_of(kernels.tile).wgmma) return {0};
  if (!kernels.one_pass) return {1, 2, 4};
  return {kernels.wide && !kernels.float_adapters ? 2 : 1};
}

std::vector<Kernels> all_kernels(const plan::Card& card, bool early_launch) {
  struct Dsdb {
    bool one_pass, wide;
  };
  std::vector<Kernels> all;
  const auto add = [&](Kernels kernels) {
    const plan::Call call{kernels.backward, kernels.float_adapters, kernels.dropout};
    for (const plan::Tile tile : plan::tiles_of(card, call)) {
      for (const bool vector : {true, false}) {
        if (!vector && tile != plan::Tile::k128x64) continue;
        kernels.tile = tile, kernels.vector = vector;
        const plan::TileFacts& facts = plan::facts_of(tile);
        if (facts.in_grid && kernels.one_pass) continue;
        kernels.early = early_launch && facts.wgmma && (kernels.backward || !facts.in_grid);
        for (const int tail : tails_of(kernels)) {
          kernels.tail = tail;
          all.push_back(kernels);
        }
      }
    }
    kernels.tile = plan::Tile::k128x64, kernels.hybrid = true, kernels.tail = 0;
    kernels.early = false;
    for (const bool vector : {true, false}) {
      kernels.vector = vector;
      all.push_back(kernels);
    }
  };
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const bool float_adapters : {false, true}) {
      for (const bool dropout : {false, true}) {
        Kernels kernels{};
        kernels.dtype = dtype, kernels.float_adapters = float_adapters, kernels.dropout = dropout;
        add(kernels);
        kernels.backward = true;
        for (const Dsdb dsdb : {Dsdb{false, false}, Dsdb{true, false}, Dsdb{true, true}}) {
          kernels.one_pass = dsdb.one_pass, kernels.wide = dsdb.wide;
          add(kernels);
        }
      }
    }
  }
  return all;
}

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
