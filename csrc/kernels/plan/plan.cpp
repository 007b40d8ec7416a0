#include "kernels/plan/plan.h"

#include <utility>

#include "kernels/plan/predict.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

Plan as_asked(const Card& card, const Problem& p, const Request& request) {
  Plan plan = choose_kernels(card, p, request);
  choose_tiles(plan, card, p, request);
  place_in_workspace(plan, p);
  return plan;
}

// Largest predicted time, relative to the other route, at which our own base product is chosen: it
// must lead by as much as a prediction may be off, but by nothing if all that is predicted is the
// time to read W, which the library's product takes, too.
double most_of_others(const Plan& plan) {
  return plan.decode() != nullptr ? 1.0 : 1.0 - kPredictionError;
}

// With half adapters, a forward without a mask leaves only the base product to our kernels: x A^T
// is one pass over x in the library, too, and its expand is the first product onto Y. For many
// adapters the library has no route that does not wait for the host.
bool hybrid_may_pay(const Problem& p) {
  return p.groups || p.backward || p.dropout || p.float_adapters;
}

std::string reason_of(const Plan& plan, const Problem& p) {
  if (plan.decode() != nullptr) return "predicted: one launch that reads the weight once";
  if (!plan.has_kernels()) return "predicted: the library for everything";
  if (!plan.hybrid())
    return "predicted to be over 10 % faster than with the library's base product";
  return p.given_base ? "predicted: our kernels, which add onto y"
                      : "predicted: the library's base product, our kernels for all else";
}

// The route with the least predicted time. Our own base product is chosen only with a lead larger
// than the error of a prediction, except for few rows: there the library's product, too, takes the
// time of its bytes.
Plan predicted_best(const Card& card, const Problem& p, const Request& request) {
  Predicted us;
  const auto planned = [&](Choice choice, double& time) {
    Request asked = request;
    asked.choice = choice;
    Plan plan = as_asked(card, p, asked);
    time = predicted_us(card, p, plan);
    return plan;
  };
  Plan best;
  if (!p.groups) us.library = predicted_us(card, p, best);
  if (hybrid_may_pay(p)) {
    Plan hybrid = planned(Choice::kHybrid, us.hybrid);
    if (p.groups || us.hybrid <= us.library) best = std::move(hybrid);
  }
  const double other = best.has_kernels() ? us.hybrid : us.library;
  Request kernels = request;
  kernels.choice = Choice::kKernel;
  const bool too_few = p.m < kMinRows && choose_kernels(card, p, kernels).decode() == nullptr;
  if (!too_few && p.kernels_can_make_base() && p.has_product()) {
    Plan kernel = planned(Choice::kKernel, us.kernel);
    if (us.kernel < most_of_others(kernel) * other) best = std::move(kernel);
  }
  best.reason = reason_of(best, p);
  if (too_few && !p.given_base)
    best.reason += ", as for all fewer than " + std::to_string(kMinRows) + " rows";
  best.predicted = us;
  return best;
}

}  // namespace

Plan make_plan(const Card& card, const Problem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return as_asked(card, p, request);
  Plan library = choose_kernels(card, p, request);
  return library.has_kernels() ? predicted_best(card, p, request) : library;
}

}  // namespace lora_ext::plan
