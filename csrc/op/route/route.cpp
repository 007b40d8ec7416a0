#include "op/route/route.h"

#include <ATen/Context.h>

#include <algorithm>
#include <map>

#include "common/check.h"
#include "cpu/dispatch.h"
#include "kernels/plan/autotune_cache.h"
#include "op/check/kernel_check.h"
#include "op/launch/kernel_launch.h"
#include "op/library/library_route.h"

namespace lora_ext::kernel_route {
namespace {

// Everything that a plan and the check of its kernels depend on.
struct PlannedCall {
  int device;
  plan::Problem problem;
  plan::Choice choice;
  bool use_pdl, deterministic;
  int reserved_sms;
  uint64_t cache_version;

  auto operator<=>(const PlannedCall&) const = default;
};

PlannedCall call_of(const at::Device& device, const plan::Problem& problem) {
  const Settings& set = settings();
  return {device.index(),
          problem,
          set.choice,
          set.use_pdl,
          at::globalContext().deterministicAlgorithms(),
          set.reserved_sms,
          autotune::version()};
}

template <class Args>
PlannedCall call_of(const Args& args) {
  return call_of(args.x.device(), kernel_launch::problem_of(args));
}

plan::Plan plan_of(const at::Device& device, const PlannedCall& call) {
  plan::Card card = kernel_launch::card_of(device);
  card.sms = std::max(2, card.sms - call.reserved_sms);  // a cluster has two
  plan::Request request =
      autotune::request_for(card, call.problem, call.choice, call.deterministic);
  request.use_pdl = call.use_pdl;
  return plan::make_plan(card, call.problem, request);
}

// Whether the kernels may run: they have passed their check, or pass it now. nullopt if the check
// could not be made this time.
std::optional<bool> may_run(const at::Device& device, const plan::Plan& plan,
                            const PlannedCall& call) {
  if (!plan.has_kernels()) return false;
  const kernel_set::Kernels kernels = kernel_set::of_plan(plan, call.problem);
  if (kernel_check::result(device, kernels).empty()) return true;
  if (kernel_launch::is_capturing(device)) return std::nullopt;
  try {
    return kernel_check::check(device, kernel_launch::card_of(device), kernels).empty();
  } catch (const c10::OutOfMemoryError&) {
    return std::nullopt;  // there may still be enough memory for the call itself
  }
}

// The plan, if its kernels may run, or null for the library route. Definite answers are cached, for
// each thread separately: planning a call takes ten times as long as finding its plan in the cache.
const plan::Plan* checked_plan(const at::Device& device, const PlannedCall& call) {
  constexpr size_t kMax = 4096;  // then the cache is cleared: serving always has new shapes
  thread_local std::map<PlannedCall, std::optional<plan::Plan>> plans;
  auto known = plans.find(call);
  if (known == plans.end()) {
    std::optional<plan::Plan> plan = plan_of(device, call);
    const std::optional<bool> may = may_run(device, *plan, call);
    if (!may) return nullptr;
    if (!*may) plan.reset();
    if (plans.size() >= kMax) plans.clear();
    known = plans.emplace(call, std::move(plan)).first;
  }
  return known->second ? &*known->second : nullptr;
}

Explained explained(const at::Device& device, const PlannedCall& call) {
  const plan::Plan plan = plan_of(device, call);
  if (!plan.has_kernels()) return {plan, ""};
  const std::string result = kernel_check::result(device, kernel_set::of_plan(plan, call.problem));
  return {plan, result.empty() ? "passed" : result};
}

// The library route of many adapters reads on the host which adapter each row has: while a graph is
// captured CUDA refuses that with an error that names no cause, and the graph is lost.
template <class Args>
void expect_no_capture(const Args& args) {
  const at::Device device = args.x.device();
  if (args.update.is_one() || !kernel_launch::is_capturing(device)) return;
  const Explained found = explained(device, call_of(args));
  const char* op = args.base.op();
  const char* many = args.base.of_experts() ? " experts of rank " : " adapters of rank ";
  const std::string call = c10::str("x of ", args.x.sizes(), " and ", args.update.adapters(), many,
                                    args.update.rank(), " at most");
  EXPECT(!found.plan.has_kernels() || (found.check != "not yet" && found.check != "passed"),
         "expected kernels that were checked before a CUDA graph is captured, but got their first "
         "use in a capture, with ",
         call,
         ": call the layer once with these shapes and dtypes before the capture, and its backward "
         "if that is captured");
  EXPECT(false,
         "expected a call that needs nothing on the host while a CUDA graph is captured, but with ",
         call, " the library route is taken, which reads there which adapter each row has (",
         found.plan.has_kernels() ? found.check : found.plan.reason,
         "): call the layer outside of the capture");
}

template <class Result, class Args>
std::optional<Result> run(const Args& args) {
  const plan::Plan* plan = checked_plan(args.x.device(), call_of(args));
  if (plan == nullptr) {
    expect_no_capture(args);
    return std::nullopt;
  }
  return kernel_launch::run(*plan, args);
}

}  // namespace

Settings& settings() {
  static Settings set;
  return set;
}

Explained explain(const ForwardArgs& args) { return explained(args.x.device(), call_of(args)); }
Explained explain(const BackwardArgs& args) { return explained(args.x.device(), call_of(args)); }
Explained explain_problem(const at::Device& device, const plan::Problem& problem) {
  return explained(device, call_of(device, problem));
}

std::optional<Forward> forward(const ForwardArgs& args) { return run<Forward>(args); }
std::optional<Backward> backward(const BackwardArgs& args) { return run<Backward>(args); }

}  // namespace lora_ext::kernel_route

namespace lora_ext::route {
namespace {

at::ScalarType y_dtype(const ForwardArgs& args) { return args.y_dtype(); }
at::ScalarType y_dtype(const BackwardArgs& args) { return args.grad.scalar_type(); }

// Throws if a row's bits would depend on the number of rows.
template <class Args>
bool needs_blocks(const Args& args) {
  if (args.base.row_block == 0) return false;
  const at::ScalarType x = args.x.scalar_type();
  if (args.x.is_cpu() && cpu::is_batch_invariant(x, y_dtype(args), args.update)) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(
      args.update.is_one() && !args.base.is_given(),
      "lora_ext.batch_invariant: expected a processor and a dtype whose products by panels give "
      "every row the same bits, as an adapter for each row and experts need, but got ",
      x, " on this one; call it outside of the block, or in another dtype");
  return true;
}

constexpr char kNoLibrary[] =
    "expected an instruction set of the CPU's kernels, but the library route is chosen";

}  // namespace

Forward forward(ForwardArgs args) {
  if (needs_blocks(args)) return forward_in_blocks(args);
  std::optional<at::Tensor>& bias = args.base.bias;
  if (kernel_launch::has_kernels(args.x.device())) {
    if (bias) bias = bias->contiguous();
    if (std::optional<Forward> out = kernel_route::forward(args)) return *std::move(out);
  }
  if (bias) bias = bias->to(args.x.scalar_type());
  if (args.x.is_cpu() && !args.base.of_experts()) {
    if (std::optional<Forward> out = cpu::forward(args)) return *std::move(out);
  }
  return library_route::forward(args);
}

Backward backward(const BackwardArgs& args) {
  if (needs_blocks(args)) return backward_in_blocks(args);
  if (kernel_launch::has_kernels(args.x.device())) {
    if (std::optional<Backward> out = kernel_route::backward(args)) return *std::move(out);
  }
  if (args.x.is_cpu() && !args.base.of_experts()) {
    if (std::optional<Backward> out = cpu::backward(args)) return *std::move(out);
  }
  return library_route::backward(args);
}

Forward forward(const char* op, const ForwardArgs& args, const cpu::Experts& experts) {
  if (args.update.lora_a.empty()) return {cpu::forward_of_base(args.x, args.base, &experts), {}};
  std::optional<Forward> out = cpu::forward(args, &experts);
  EXPECT(out, kNoLibrary);
  return *std::move(out);
}

Backward backward(const char* op, const BackwardArgs& args, const cpu::Experts& experts) {
  if (args.update.lora_a.empty()) {
    return {cpu::backward_of_base(args.grad, args.x, args.base, &experts), {}, {}};
  }
  std::optional<Backward> out = cpu::backward(args, &experts);
  EXPECT(out, kNoLibrary);
  return *std::move(out);
}

Forward forward_of_few_rows(const char* op, const ExpertsArgs& args) {
  EXPECT(cpu::kernels_for_few_rows() != nullptr, kNoLibrary);
  return cpu::experts_few_rows(args);
}

}  // namespace lora_ext::route
