#ifdef LORA_EXT_WITH_CUDA
#include "route/kernel_route.h"

#include <ATen/Context.h>

#include <atomic>

#include "check/kernel_check.h"
#include "launch/kernel_launch.h"
#include "plan/winners.h"

namespace lora_ext::kernel_route {
namespace {

std::atomic<plan::Choice>& choice() {
  static std::atomic<plan::Choice> current{plan::Choice::kAuto};
  return current;
}

std::atomic<bool>& early_launch() {
  static std::atomic<bool> enabled{true};
  return enabled;
}

plan::Plan plan_for(const at::Device& device, const plan::Problem& problem, bool backward) {
  const plan::Card card = kernel_launch::card_of(device);
  plan::Request request = winners::request_for(card, problem, backward, choice(),
                                               at::globalContext().deterministicAlgorithms());
  request.early_launch = early_launch();
  return backward ? plan::backward(card, problem, request) : plan::forward(card, problem, request);
}

template <class Args>
plan::Plan plan_of(const Args& args) {
  return plan_for(args.x.device(), kernel_launch::problem_of(args),
                  std::is_same_v<Args, BackwardArgs>);
}

template <class Args>
kernel_set::Kernels kernels_of(const plan::Plan& plan, const Args& args) {
  return kernel_set::of_plan(plan, kernel_launch::problem_of(args),
                             std::is_same_v<Args, BackwardArgs>, args.x.scalar_type() == at::kHalf);
}

// Whether the kernels may run: they have passed their check, or pass it now.
template <class Args>
bool may_run(const plan::Plan& plan, const Args& args) {
  const at::Device device = args.x.device();
  const kernel_set::Kernels kernels = kernels_of(plan, args);
  if (kernel_check::result(device, kernels).empty()) return true;
  if (kernel_launch::is_capturing(device)) return false;
  try {
    return kernel_check::check(device, kernel_launch::card_of(device), kernels).empty();
  } catch (const c10::OutOfMemoryError&) {
    return false;  // this once: the call itself may still have what it needs
  }
}

template <class Result, class Args>
std::optional<Result> run(const Args& args) {
  const plan::Plan plan = plan_of(args);
  if (!plan.kernel || !may_run(plan, args)) return std::nullopt;
  return kernel_launch::run(plan, args);
}

Explained explained(const at::Device& device, const plan::Problem& problem, bool backward,
                    bool float16) {
  const plan::Plan plan = plan_for(device, problem, backward);
  if (!plan.kernel) return {plan, ""};
  const std::string result =
      kernel_check::result(device, kernel_set::of_plan(plan, problem, backward, float16));
  return {plan, result.empty() ? "passed" : result};
}

template <class Args>
Explained explained(const Args& args) {
  return explained(args.x.device(), kernel_launch::problem_of(args),
                   std::is_same_v<Args, BackwardArgs>, args.x.scalar_type() == at::kHalf);
}

}  // namespace

Explained explain(const ForwardArgs& args) { return explained(args); }
Explained explain(const BackwardArgs& args) { return explained(args); }
Explained explain_problem(const at::Device& device, const plan::Problem& problem, bool float16) {
  return explained(device, problem, false, float16);
}

std::optional<Forward> forward(const ForwardArgs& args) { return run<Forward>(args); }
std::optional<Backward> backward(const BackwardArgs& args) { return run<Backward>(args); }

void set_choice(plan::Choice wanted) { choice() = wanted; }
plan::Choice current_choice() { return choice(); }
void set_early_launch(bool enabled) { early_launch() = enabled; }
bool current_early_launch() { return early_launch(); }

}  // namespace lora_ext::kernel_route
#endif  // LORA_EXT_WITH_CUDA
