#include "op/check/kernel_check.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "common/check.h"
#include "op/check/kernel_bounds.h"
#include "op/launch/kernel_launch.h"
#include "op/library/library_route.h"

namespace lora_ext::kernel_check {
namespace {

constexpr char kNotYet[] = "not yet";

struct Results {
  std::mutex mutex;
  std::map<std::tuple<int, Kernels>, std::string> by_kernels;
};
Results& all_results() {
  static Results all;
  return all;
}

std::atomic<double>& most_seconds() {
  static std::atomic<double> seconds{10.0};
  return seconds;
}

std::function<void(const std::string&)>& warning() {
  static std::function<void(const std::string&)> warn;
  return warn;
}

// Scattered numbers in (-size, size), computed without a random generator: the state of torch's
// generator must not change.
at::Tensor numbers(at::IntArrayRef shape, double step, double size, const at::TensorOptions& like) {
  const int64_t count = c10::multiply_integers(shape);
  const at::Tensor scattered = at::arange(count, like.dtype(at::kFloat)).mul_(step).sin_();
  return scattered.mul_(43758.5).frac_().mul_(size).view(shape).to(like.dtype());
}

// "" if the values agree, else what differs.
std::string compare(const char* name, const at::Tensor& got, const at::Tensor& expected,
                    const at::Tensor& allowed) {
  const at::Tensor off = got.to(at::kDouble).sub_(expected).abs_();
  // Elements that no kernel writes may have any value, also NaN: their bound is infinite.
  const at::Tensor excess = off.sub(allowed).masked_fill_(allowed.isinf(), 0);
  if (excess.max().item<double>() <= 0) return "";  // false for NaN
  const int64_t worst = excess.argmax().item<int64_t>();
  return c10::str(name, " differs from its value in float64 by ",
                  off.flatten()[worst].item<double>(), " in row ", worst / got.size(1), ", column ",
                  worst % got.size(1), ", more than ", allowed.flatten()[worst].item<double>());
}

// S has no values in rows without an adapter; their bound is infinite.
std::string compare_all(const Forward& got, const Forward& expected, const Forward& allowed) {
  const std::string y = compare("y", got.y, expected.y, allowed.y);
  return y.empty() ? compare("s", got.s, expected.s, allowed.s) : y;
}
std::string compare_all(const Backward& got, const Backward& expected, const Backward& allowed) {
  std::string off = compare("dx", got.dx, expected.dx, allowed.dx);
  for (size_t g = 0; off.empty() && g < got.dlora_a.size(); ++g) {
    off = compare("dlora_a", got.dlora_a[g], expected.dlora_a[g], allowed.dlora_a[g]);
    if (!off.empty() || !got.dlora_b[g].defined()) continue;
    off = compare("dlora_b", got.dlora_b[g], expected.dlora_b[g], allowed.dlora_b[g]);
  }
  return off;
}

// "" if a second launch gives the same values, else what differs. Only what has no bound may have
// any value.
std::string compare_launches(const Forward& first, const Forward& second, const Forward& allowed) {
  const auto differs = [](const at::Tensor& one, const at::Tensor& other, const at::Tensor& bound) {
    return one.ne(other).logical_and_(bound.isfinite()).any().item<bool>();
  };
  const char* off = differs(first.y, second.y, allowed.y)   ? "y"
                    : differs(first.s, second.s, allowed.s) ? "s"
                                                            : nullptr;
  return off == nullptr ? "" : c10::str(off, " of a second launch differs from that of the first");
}

template <class Args>
auto by_library(const Args& args) {
  if constexpr (std::is_same_v<Args, ForwardArgs>)
    return library_route::forward(args);
  else
    return library_route::backward(args);
}

// Throws if the kernels may never end, or have left the device unusable.
void wait_for(const at::Device& device, const Kernels& kernels) {
  const double seconds = timeout();
  const std::optional<std::string> error = kernel_launch::wait(device, seconds);
  if (error == "") return;
  const std::string failure = error ? "ended in an error of the device: " + *error
                                    : c10::str("had not ended ", seconds, " s after their launch");
  remember(device, kernels, failure);
  LORA_EXT_CHECK(
      false, "the kernels \"", kernels.name(), "\", checked before their first use on ", device,
      ", ", failure,
      ". This process can use the device no more: restart it, and call "
      "lora_ext.kernels.set_cuda_route(\"library\") first, or lora_ext.warmup(model, rows=...), "
      "which checks in a process of its own.");
}

// Gradients of a pool, which of experts are in PEFT's layout, as those of a list.
void take_apart(Forward&, const Update&) {}
void take_apart(Backward& got, const Update& update) {
  if (!update.is_pool()) return;
  const int64_t adapters = update.adapters(), rank = update.rank();
  for (Factors* factors : {&got.dlora_a, &got.dlora_b}) {
    at::Tensor pool = (*factors)[0];
    if (!pool.defined()) continue;
    if (update.experts()) {
      pool = factors == &got.dlora_a ? pool.view({adapters, rank, -1})
                                     : pool.view({-1, rank, adapters}).permute({2, 0, 1});
    }
    factors->clear();
    for (int64_t g = 0; g < adapters; ++g) factors->push_back(pool[g]);
  }
}

// Launches `launched`, which says the same as `args` in another form, or is `args`.
template <class Args>
std::string run_case(const plan::Card& card, const Kernels& kernels, const plan::Request& request,
                     const Args& args, const Args& launched) {
  const plan::Problem problem = kernel_launch::problem_of(launched);
  const plan::Plan plan = plan::make_plan(card, problem, request);
  const Kernels planned = kernel_set::of_plan(plan, problem);
  if (planned != kernels) return "the small case takes other kernels: " + planned.name();
  const at::Device device = args.x.device();
  const auto exact = kernel_bounds::in_double(args);
  auto expected = by_library(exact);
  take_apart(expected, exact.update);
  // A given base is not a product of the library, so it is not rounded once more.
  const auto allowed =
      kernel_bounds::allowed(args, exact, expected, kernels.hybrid && !kernels.given_base);
  // Work that was queued before may take any time, and its errors do not come from the kernels.
  const auto before = kernel_launch::wait(device, std::numeric_limits<double>::infinity());
  LORA_EXT_CHECK(before == "", "expected ", device,
                 " in order, but got an error of what ran before: ", before.value_or(""));
  try {
    auto got = kernel_launch::run(plan, launched);
    wait_for(device, kernels);
    take_apart(got, launched.update);
    std::string off = compare_all(got, expected, allowed);
    if constexpr (std::is_same_v<Args, ForwardArgs>) {
      // lora_decode counts from what the launch before has left.
      if (off.empty() && plan.decode()) {
        const Forward again = kernel_launch::run(plan, args);
        wait_for(device, kernels);
        off = compare_launches(got, again, allowed);
      }
    }
    return off;
  } catch (const kernel_launch::LaunchError& error) {
    return error.what_without_backtrace();
  }
}

// Five adapters with ranks up to that of `one`, two of them without rows, and rows without an
// adapter. Each of the others has every fourth row, so that a tile has rows of several adapters and
// the rows of one adapter are not contiguous.
Update many_of(const Update& one, int64_t rows, const at::TensorOptions& options) {
  constexpr int64_t kAdapters = 5;
  Update update;
  update.dropout = one.dropout;
  for (int64_t g = 0; g < kAdapters; ++g) {
    const int64_t own = std::max<int64_t>(1, one.rank() - 7 * g);
    update.lora_a.push_back(one.a().narrow(0, 0, own).mul(1.0 + 0.25 * double(g)));
    update.lora_b.push_back(one.b().narrow(1, 0, own).contiguous());
  }
  const at::Tensor turns = at::arange(rows, options.dtype(at::kInt));
  update.grouping =
      Grouping{at::arange(1, kAdapters + 1, options.dtype(at::kFloat)).mul_(0.5),
               turns.add(turns.floor_divide(4)).remainder(kAdapters).sub_(1).to(at::kInt)};
  return update;
}

// A pool whose adapters have ranges of rows, one of them empty, and last come rows without an adapter,
// as experts have them onto a base product of torch's; and the same as a list with an index.
struct InTwoForms {
  Update list, pool;
};
InTwoForms pool_of(const Update& one, int64_t rows, const at::TensorOptions& options) {
  const at::Tensor sizes = at::arange(1, 5, one.a().options()).mul_(0.5).reshape({4, 1, 1});
  const at::Tensor scaling = at::arange(1, 5, options.dtype(at::kFloat)).mul_(0.5);
  const at::Tensor ends = at::full({4}, rows - 5, options.dtype(at::kInt));
  ends[0].fill_(rows / 3), ends[1].fill_(rows / 3), ends[2].fill_(rows / 2);
  const at::Tensor turns = at::arange(rows, options.dtype(at::kInt)).unsqueeze(1);
  const at::Tensor ended = turns.ge(ends).sum(1).to(at::kInt);
  InTwoForms update;
  update.list.dropout = update.pool.dropout = one.dropout;
  update.pool.lora_a = {one.a().mul(sizes)}, update.pool.lora_b = {one.b().mul(sizes)};
  for (int64_t g = 0; g < 4; ++g) {
    update.list.lora_a.push_back(update.pool.lora_a[0][g]);
    update.list.lora_b.push_back(update.pool.lora_b[0][g]);
  }
  update.pool.grouping = Grouping{scaling, std::nullopt, ends};
  update.list.grouping = Grouping{scaling, ended.masked_fill(ended.eq(4), -1)};
  return update;
}

at::Tensor weight_of(const Kernels& kernels, int64_t n, int64_t k,
                     const at::TensorOptions& options) {
  if (!kernels.experts) return numbers({n, k}, 12.37, 0.1, options);
  return kernels.transposed ? numbers({2, k, n}, 12.37, 0.1, options).transpose(1, 2)
                            : numbers({2, n, k}, 12.37, 0.1, options);
}

// A pool as halves in whole chunks along the rank.
at::Tensor in_halves(const at::Tensor& pool, int64_t rank_dim, const Kernels& kernels) {
  const at::ScalarType half = scalar_type_of(kernels.dtype);
  const at::Tensor hi = pool.to(half);
  std::vector<at::Tensor> terms{hi};
  if (kernels.float_adapters)
    terms.push_back(pool.sub(hi).mul_(kernel_dtype(kernels.dtype).lo_scale).to(half));
  std::vector<int64_t> padded = pool.sizes().vec();
  const int64_t rank = padded[rank_dim], width = (rank + 7) / 8 * 8;
  padded[rank_dim] = width * static_cast<int64_t>(terms.size());
  at::Tensor out = at::zeros(padded, hi.options());
  for (size_t i = 0; i < terms.size(); ++i)
    out.narrow(rank_dim, static_cast<int64_t>(i) * width, rank).copy_(terms[i]);
  return out;
}

// Of experts' rows, as the op that sorts them writes them: those are checked, too.
at::Tensor tables_of(const at::Tensor& index, int64_t groups, int64_t adapters) {
  using Routes = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lora_ext::experts_routes", "")
                             .typed<Routes(const at::Tensor&, c10::SymInt, int64_t)>();
  return std::get<4>(op.call(index.unsqueeze(1), groups, adapters));
}

// The update of a projection of two experts with two adapters each, of which one has no rows, and
// last come rows of none: as a pool of the factors, and as one of halves. Rows of x, grad and the
// mask are elsewhere.
InTwoForms experts_of(const Update& one, const Kernels& kernels, int64_t rows, int64_t tokens,
                      const at::TensorOptions& options) {
  const at::TensorOptions adapter = one.a().options();
  const InTwoForms ranges = pool_of(one, rows, options);
  InTwoForms update{ranges.pool, {}};
  const at::Tensor turns = at::arange(rows, options.dtype(at::kLong));
  const auto every = [&](int64_t step, int64_t count) {
    return turns.mul(step).remainder(count).to(at::kInt);
  };
  ExpertRows experts{rows, one.rank(), kernels.float_adapters, every(5, tokens)};
  experts.mask = every(7, rows), experts.adapters = 2;
  experts.tables =
      tables_of(*ranges.list.grouping->index, update.list.adapters(), experts.adapters);
  if (kernels.backward) {
    experts.grad = every(11, tokens);
    experts.weights = numbers({rows}, 12.17, 1, adapter), experts.slots = every(3, rows);
  }
  update.list.grouping->experts = experts;
  update.list.grouping->scaling = at::Tensor(), update.list.scaling = 1.5;
  update.pool = update.list;
  update.pool.lora_a = {in_halves(update.list.lora_a[0], 1, kernels)};
  update.pool.lora_b = {in_halves(update.list.lora_b[0], 2, kernels)};
  return update;
}

std::string run_small_case(const at::Device& device, const plan::Card& card,
                           const Kernels& kernels) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const kernel_set::SmallCase small = kernel_set::small_case(kernels);
  const plan::Problem& problem = small.problem;
  const int64_t m = problem.m, n = problem.n, k = problem.k, rank = problem.rank;
  const int64_t tokens = kernels.experts ? m / 2 : m;
  const at::ScalarType dtype = scalar_type_of(kernels.dtype);
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const auto adapter = options.dtype(kernels.float_adapters ? at::kFloat : dtype);
  DropoutArgs dropout;
  if (kernels.dropout) {
    dropout.p = 0.25;
    dropout.seed = at::full({}, 7, options.dtype(at::kLong));
  }
  const at::Tensor x = numbers({tokens, k}, 12.71, 1, options);
  const at::Tensor w = weight_of(kernels, n, k, options);
  const at::Tensor a = numbers({rank, k}, 12.53, 0.1, adapter);
  const at::Tensor b = numbers({n, rank}, 12.29, 0.1, adapter);
  const auto run = [&](const Update& update, const Update& launched) {
    if (!kernels.backward) {
      const at::IntArrayRef bias = w.sizes().slice(0, w.dim() - 1);
      const Base base = kernels.given_base ? Base::given(numbers({m, n}, 12.61, 1, options))
                                           : Base{w, numbers(bias, 12.9, 1, options)};
      return run_case(card, kernels, small.request, ForwardArgs{x, base, update},
                      ForwardArgs{x, base, launched});
    }
    const at::Tensor grad = numbers({tokens, n}, 12.47, 1, options);
    const at::Tensor s = numbers({m, rank}, 12.83, 1, options.dtype(at::kFloat));
    const auto args = [&](const Update& of) {
      const size_t factors = of.lora_a.size();
      const Wanted wanted{problem.need_dx, NeedsGrad(factors, problem.need_dlora_a),
                          NeedsGrad(factors, problem.need_dlora_b)};
      return BackwardArgs{grad, x, Base{w}, of, s, wanted};
    };
    return run_case(card, kernels, small.request, args(update), args(launched));
  };
  const Update one = Update::one(a, b, 2.0, dropout);
  if (!kernels.grouped) return run(one, one);
  if (kernels.experts) {
    const InTwoForms update = experts_of(one, kernels, m, tokens, options);
    return run(update.list, update.pool);
  }
  const Update many = many_of(one, m, options);
  const std::string off = run(many, many);
  const bool has_ranges = kernels.hybrid && (kernels.backward || kernels.given_base);
  if (!off.empty() || !has_ranges) return off;
  const InTwoForms ranges = pool_of(one, m, options);
  return run(ranges.list, ranges.pool);
}

}  // namespace

std::string result(const at::Device& device, const Kernels& kernels) {
  const std::lock_guard lock(all_results().mutex);
  const auto found = all_results().by_kernels.find({device.index(), kernels});
  return found == all_results().by_kernels.end() ? kNotYet : found->second;
}

std::vector<std::pair<Kernels, std::string>> results(const at::Device& device) {
  std::vector<std::pair<Kernels, std::string>> found;
  const std::lock_guard lock(all_results().mutex);
  for (const auto& [key, result] : all_results().by_kernels) {
    if (std::get<int>(key) == device.index()) found.emplace_back(std::get<Kernels>(key), result);
  }
  return found;
}

std::string remember(const at::Device& device, const Kernels& kernels, const std::string& result) {
  {
    const std::lock_guard lock(all_results().mutex);
    const auto [known, added] =
        all_results().by_kernels.try_emplace({device.index(), kernels}, result);
    if (!added) return known->second;
  }
  if (result.empty()) return result;
  const std::string text = "lora_ext: the kernels \"" + kernels.name() +
                           "\" failed their check on " + device.str() +
                           " and are not used there; the library route is. " + result;
  if (warning()) {
    warning()(text);
  } else {
    TORCH_WARN(text);
  }
  return result;
}

std::string check(const at::Device& device, const plan::Card& card, const Kernels& kernels) {
  const std::string known = result(device, kernels);
  if (known != kNotYet) return known;
  return remember(device, kernels, run_small_case(device, card, kernels));
}

void set_timeout(double seconds) { most_seconds() = seconds; }
double timeout() { return most_seconds(); }

void set_warn(std::function<void(const std::string&)> warn) { warning() = std::move(warn); }

}  // namespace lora_ext::kernel_check
