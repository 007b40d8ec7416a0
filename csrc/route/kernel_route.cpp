#include "route/kernel_route.h"

#include <ATen/Context.h>

#include <algorithm>
#include <atomic>
#include <map>

#include "check/kernel_check.h"
#include "launch/grouped_launch.h"
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

std::atomic<int>& reserved() {
  static std::atomic<int> sms{0};
  return sms;
}

// Of one adapter, or of many.
template <class Problem>
struct Planned;
template <>
struct Planned<plan::Problem> {
  using Plan = plan::Plan;
  static const plan::Plan& one(const Plan& plan) { return plan; }
  static const plan::Problem& one(const plan::Problem& problem) { return problem; }
};
template <>
struct Planned<plan::GroupedProblem> {
  using Plan = plan::GroupedPlan;
  static const plan::Plan& one(const Plan& plan) { return plan.one; }
  static const plan::Problem& one(const plan::GroupedProblem& problem) { return problem.one; }
};

// Whatever a plan and the kernels' check depend on.
template <class Problem>
struct PlannedCall {
  int device;
  Problem problem;
  bool backward, float16;
  plan::Choice choice;
  bool early_launch, deterministic;
  int reserved_sms;
  uint64_t winners;

  auto operator<=>(const PlannedCall&) const = default;
};

template <class Problem>
PlannedCall<Problem> call_of(const at::Device& device, const Problem& problem, bool backward,
                             bool float16) {
  return {device.index(),
          problem,
          backward,
          float16,
          choice(),
          early_launch(),
          at::globalContext().deterministicAlgorithms(),
          reserved_sms(),
          winners::version()};
}

template <class Args>
auto call_of(const Args& args) {
  constexpr bool kBackward =
      std::is_same_v<Args, BackwardArgs> || std::is_same_v<Args, GroupedBackwardArgs>;
  return call_of(args.x.device(), kernel_launch::problem_of(args), kBackward,
                 args.x.scalar_type() == at::kHalf);
}

plan::Request request_for(const plan::Card& card, const PlannedCall<plan::Problem>& call) {
  return winners::request_for(card, call.problem, call.backward, call.choice, call.deterministic);
}
// Nobody times calls of many adapters: what is faster depends on whose the rows are.
plan::Request request_for(const plan::Card&, const PlannedCall<plan::GroupedProblem>& call) {
  return {call.choice};
}

template <class Problem>
auto plan_of(const at::Device& device, const PlannedCall<Problem>& call) {
  plan::Card card = kernel_launch::card_of(device);
  card.sms = std::max(2, card.sms - call.reserved_sms);  // a cluster has two
  plan::Request request = request_for(card, call);
  request.early_launch = call.early_launch;
  return kernel_set::plan_of(card, call.problem, request, call.backward);
}

template <class Problem>
kernel_set::Kernels kernels_of(const typename Planned<Problem>::Plan& plan,
                               const PlannedCall<Problem>& call) {
  return kernel_set::of_plan(plan, call.problem, call.backward, call.float16);
}

// Whether the kernels may run: they have passed their check, or pass it now. nullopt where it could
// not be made this time.
template <class Problem>
std::optional<bool> may_run(const at::Device& device, const typename Planned<Problem>::Plan& plan,
                            const PlannedCall<Problem>& call) {
  if (!Planned<Problem>::one(plan).kernel) return false;
  const kernel_set::Kernels kernels = kernels_of(plan, call);
  if (kernel_check::result(device, kernels).empty()) return true;
  if (kernel_launch::is_capturing(device)) return std::nullopt;
  try {
    return kernel_check::check(device, kernel_launch::card_of(device), kernels).empty();
  } catch (const c10::OutOfMemoryError&) {
    return std::nullopt;  // the call itself may still have what it needs
  }
}

// The plan whose kernels may run, or null for the library route. What is certain is remembered, by
// each thread for itself: planning a call takes ten times as long as finding its plan again.
template <class Problem>
const typename Planned<Problem>::Plan* checked_plan(const at::Device& device,
                                                    const PlannedCall<Problem>& call) {
  using Plans = std::map<PlannedCall<Problem>, std::optional<typename Planned<Problem>::Plan>>;
  constexpr size_t kMost = 4096;  // then all are forgotten: serving has ever new shapes
  thread_local Plans plans;
  auto known = plans.find(call);
  if (known == plans.end()) {
    std::optional<typename Planned<Problem>::Plan> plan = plan_of(device, call);
    const std::optional<bool> may = may_run(device, *plan, call);
    if (!may) return nullptr;
    if (!*may) plan.reset();
    if (plans.size() >= kMost) plans.clear();
    known = plans.emplace(call, std::move(plan)).first;
  }
  return known->second ? &*known->second : nullptr;
}

template <class Result, class Args>
std::optional<Result> run(const Args& args) {
  const auto* plan = checked_plan(args.x.device(), call_of(args));
  if (plan == nullptr) return std::nullopt;
  return kernel_launch::run(*plan, args);
}

Explained explained(const at::Device& device, const PlannedCall<plan::Problem>& call) {
  const plan::Plan plan = plan_of(device, call);
  if (!plan.kernel) return {plan, ""};
  const std::string result = kernel_check::result(device, kernels_of(plan, call));
  return {plan, result.empty() ? "passed" : result};
}

}  // namespace

Explained explain(const ForwardArgs& args) { return explained(args.x.device(), call_of(args)); }
Explained explain(const BackwardArgs& args) { return explained(args.x.device(), call_of(args)); }
Explained explain_problem(const at::Device& device, const plan::Problem& problem, bool float16) {
  return explained(device, call_of(device, problem, false, float16));
}

std::optional<Forward> forward(const ForwardArgs& args) { return run<Forward>(args); }
std::optional<Backward> backward(const BackwardArgs& args) { return run<Backward>(args); }
std::optional<GroupedForward> forward(const GroupedForwardArgs& args) {
  return run<GroupedForward>(args);
}
std::optional<GroupedBackward> backward(const GroupedBackwardArgs& args) {
  return run<GroupedBackward>(args);
}

void set_choice(plan::Choice wanted) { choice() = wanted; }
plan::Choice current_choice() { return choice(); }
void set_early_launch(bool enabled) { early_launch() = enabled; }
bool current_early_launch() { return early_launch(); }
void set_reserved_sms(int count) { reserved() = count; }
int reserved_sms() { return reserved(); }

}  // namespace lora_ext::kernel_route
