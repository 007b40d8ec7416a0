// The plan that is asked for, or the one with the least predicted time; and its description.
#include "kernels/plan/plan.h"

#include <iomanip>
#include <sstream>

#include "kernels/plan/predict.h"
#include "kernels/plan/steps.h"

namespace lora_ext::plan {
namespace {

// Our own base product is chosen only with this lead on the device: what a prediction may be off.
// lora_decode needs none, since the library's product of few rows, too, takes the time to read W.
constexpr double kLead = 0.10;

// Of the tiles that it may have, that with the least predicted time.
Plan as_asked(const Card& card, const Problem& p, Request request) {
  const Plan kernels = choose_kernels(card, p, request);
  Plan best = kernels;
  double least = std::numeric_limits<double>::infinity();
  for (const Tile tile : tiles_for(kernels, request)) {
    Plan plan = kernels;
    request.tile = tile;
    choose_tiles(plan, request);
    place_in_workspace(plan);
    const double us = predict(plan).device;
    if (us < least) best = std::move(plan), least = us;
  }
  return best;
}

std::string reason_of(const Plan& plan, const Problem& p) {
  if (plan.decode() != nullptr) return "predicted: one launch that reads the weight once";
  if (!plan.has_kernels()) return "predicted: the library for everything";
  if (p.given_base) return "predicted: our kernels, which add onto y";
  if (plan.hybrid()) return "predicted: the library's base product, our kernels for all else";
  return "predicted to be over 10 % faster than with the library's base product";
}

Plan predicted_best(const Card& card, const Problem& p, Request request) {
  Plan best;
  best.card = card, best.problem = p;
  std::vector<std::pair<std::string, double>> us;
  const auto planned = [&](Choice choice, const char* route) {
    request.choice = choice;
    Plan plan = as_asked(card, p, request);
    us.emplace_back(route, predict(plan).call);
    return plan;
  };
  // For many adapters the library has no route that does not wait for the host.
  if (!p.groups) us.emplace_back("library", predict(best).call);
  // With half adapters, a forward without a mask leaves only the base product to our kernels: x A^T
  // is one pass over x in the library, too, and its expand is the first product onto Y.
  if (p.groups || p.backward || p.dropout || p.float_adapters) {
    Plan hybrid = planned(Choice::kHybrid, "hybrid");
    if (p.groups || predict(hybrid).call <= predict(best).call) best = std::move(hybrid);
  }
  if (p.kernels_can_make_base() && p.has_product()) {
    Plan kernel = planned(Choice::kKernel, "kernel");
    const double most = kernel.decode() != nullptr ? 1 : 1 - kLead;
    if (predict(kernel).device < most * predict(best).device) best = std::move(kernel);
  }
  best.reason = reason_of(best, p);
  best.predicted_us = std::move(us);
  return best;
}

}  // namespace

Plan make_plan(const Card& card, const Problem& p, const Request& request) {
  if (request.choice != Choice::kAuto || p.own_weights()) return as_asked(card, p, request);
  Plan library = choose_kernels(card, p, request);
  return library.has_kernels() ? predicted_best(card, p, request) : library;
}

std::string Plan::describe() const {
  std::ostringstream text;
  text << (hybrid() ? "hybrid: " : has_kernels() ? "kernels: " : "library: ") << reason;
  text << std::fixed << std::setprecision(1);
  const char* before = "\n  predicted: ";
  for (const auto& [route, us] : predicted_us)
    text << std::exchange(before, ", ") << route << " " << us << " us";
  if (!has_kernels()) return text.str();
  const Tiled* many = problem.groups ? tiled() : nullptr;
  for (const Launch& launch : launches_of(*this)) {
    std::string name = launch.name;
    if (many != nullptr && name.starts_with("lora_")) name.insert(5, "grouped_");
    if (launch.flop > 0) name += ", " + std::to_string(launch.blocks) + " blocks";
    if (launch.us(card) > 0) text << "\n  " << name << ", " << launch.us(card) << " us";
  }
  if (tiled() != nullptr && tiled()->gemm) {
    const Gemm& gemm = *tiled()->gemm;
    text << "\n  tiles of " << facts_of(gemm.tile).name;
    if (!tiled()->vector) text << ", element-wise stores";
    if (gemm.use_pdl) text << ", launched with PDL";
    if (!tiled()->no_wgmma.empty()) text << "\n  without wgmma: " << tiled()->no_wgmma;
  }
  text << "\n  workspace " << workspace << " bytes";
  return text.str();
}

}  // namespace lora_ext::plan
