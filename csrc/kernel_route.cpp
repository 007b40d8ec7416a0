#ifdef LORA_EXT_WITH_CUDA
#include "kernel_route.h"

#include <atomic>

#include "kernel_check.h"
#include "kernel_launch.h"
#include "winners.h"

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

template <class Args>
plan::Plan plan_of(const Args& args) {
  constexpr bool kBackward = std::is_same_v<Args, BackwardArgs>;
  const plan::Card card = kernel_launch::card_of(args.x.device());
  const plan::Problem problem = kernel_launch::problem_of(args);
  plan::Request request = winners::request_for(card, problem, kBackward, choice());
  request.early_launch = early_launch();
  return kBackward ? plan::backward(card, problem, request) : plan::forward(card, problem, request);
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
  return kernel_check::check(device, kernel_launch::card_of(device), kernels).empty();
}

template <class Result, class Args>
std::optional<Result> run(const Args& args) {
  const plan::Plan plan = plan_of(args);
  if (!plan.kernel || !may_run(plan, args)) return std::nullopt;
  return kernel_launch::run(plan, args);
}

template <class Args>
Explained explained(const Args& args) {
  const plan::Plan plan = plan_of(args);
  if (!plan.kernel) return {plan, ""};
  const std::string result = kernel_check::result(args.x.device(), kernels_of(plan, args));
  return {plan, result.empty() ? "passed" : result};
}

}  // namespace

Explained explain(const ForwardArgs& args) { return explained(args); }
Explained explain(const BackwardArgs& args) { return explained(args); }

std::optional<Forward> forward(const ForwardArgs& args) { return run<Forward>(args); }
std::optional<Backward> backward(const BackwardArgs& args) { return run<Backward>(args); }

std::vector<std::string> warmup(const at::Device& device) {
  const plan::Card card = kernel_launch::card_of(device);
  std::vector<std::string> failed;
  for (const kernel_set::Kernels& kernels : kernel_set::all_of(card, early_launch())) {
    const std::string result = kernel_check::check(device, card, kernels);
    if (!result.empty()) failed.push_back(kernels.name() + ": " + result);
  }
  return failed;
}

void set_choice(plan::Choice wanted) { choice() = wanted; }
plan::Choice current_choice() { return choice(); }
void set_early_launch(bool enabled) { early_launch() = enabled; }

}  // namespace lora_ext::kernel_route
#endif  // LORA_EXT_WITH_CUDA
