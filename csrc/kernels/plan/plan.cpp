// The plan that is asked for, or the one with the least predicted time; and its description.
#include "kernels/plan/plan.h"

#include <iomanip>
#include <sstream>
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

std::string number(int64_t count, const char* of) { return std::to_string(count) + " " + of; }

std::string describe_gemm(const Tiled& plan, const char* kernel) {
  const Gemm& gemm = *plan.gemm;
  std::ostringstream text;
  text << "  " << kernel << " " << facts_of(gemm.tile).name
       << (plan.vector ? "" : ", element-wise stores") << ", " << number(gemm.blocks, "blocks")
       << (gemm.use_pdl ? ", launched with PDL" : "")
       << (plan.base == Base::kKernel ? "" : ", low rank") << "\n";
  if (!plan.no_wgmma.empty()) text << "  without wgmma: " << plan.no_wgmma << "\n";
  if (plan.base == Base::kLibrary) text << "  the library's base product, onto it\n";
  return text.str();
}

std::string describe_shrink(const Tiled& plan, const char* kernel) {
  if (plan.shrink.splits == 0) return "";
  return std::string("  ") + kernel + " " + number(plan.shrink.splits, "splits of ") +
         number(plan.shrink.steps_per_split, "steps\n");
}

std::string describe_one(const Tiled& plan) {
  std::ostringstream text;
  if (plan.a != kNone || plan.b != kNone || plan.s != kNone) {
    text << "  lora_split " << (plan.a != kNone ? "A " : "") << (plan.b != kNone ? "B " : "")
         << (plan.s != kNone ? "S " : "") << "into "
         << (plan.terms == 2 ? "hi and lo" : "whole chunks") << "\n";
  }
  if (plan.one_pass()) {
    text << "  lora_dsdb " << number(plan.panels, "panels, ")
         << number(plan.dlora_b.splits, "splits\n");
  }
  text << describe_shrink(plan, "lora_shrink");
  if (plan.z != kNone) text << "  lora_reduce\n";
  if (plan.gemm) text << describe_gemm(plan, "lora_gemm");
  if (plan.has_wgrad()) {
    text << "  lora_wgrad";
    if (plan.dlora_a.splits > 0) text << " A: " << number(plan.dlora_a.splits, "splits");
    if (plan.db_apart()) text << " B: " << number(plan.dlora_b.splits, "splits");
    text << (plan.wgrad_uses_pdl ? ", launched with PDL\n" : "\n");
  }
  if (plan.g_a != kNone || plan.g_b != kNone) text << "  lora_reduce_wgrad\n";
  return text.str();
}

std::string describe_many(const Tiled& plan) {
  const Tables& tables = *plan.tables;
  std::ostringstream text;
  if (tables.entries != kNone) text << "  lora_grouped_entries\n";
  text << "  lora_grouped_" << (tables.order != kNone ? "count, scan, place\n" : "scan\n")
       << describe_shrink(plan, "lora_grouped_shrink");
  if (plan.shrink.splits > 0) text << "  lora_grouped_reduce\n";
  if (plan.s != kNone) text << "  lora_grouped_reduce S\n";
  if (plan.gemm) text << describe_gemm(plan, "lora_grouped_gemm");
  if (plan.has_wgrad()) {
    text << "  lora_grouped_wgrad" << (plan.g_a != kNone ? " A" : "")
         << (plan.g_b != kNone ? " B" : "") << ", pieces of " << number(tables.piece_rows, "rows\n")
         << "  lora_grouped_reduce_wgrad\n";
  }
  return text.str();
}

std::string describe_decode(const Decode& plan) {
  std::ostringstream text;
  if (plan.entries != kNone) text << "  lora_grouped_entries\n";
  text << "  lora_decode up to " << number(plan.batch, "rows, ") << number(plan.blocks, "blocks, ")
       << number(plan.tiles, "tiles, ") << number(plan.s_tiles, "of S\n");
  return text.str();
}

}  // namespace

Plan make_plan(const Card& card, const Problem& p, const Request& request) {
  if (request.choice != Choice::kAuto) return as_asked(card, p, request);
  Plan library = choose_kernels(card, p, request);
  return library.has_kernels() ? predicted_best(card, p, request) : library;
}

// "library 12 us, hybrid 11 us"; routes that were left out are not listed.
std::string Predicted::describe() const {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  const auto tell = [&](const char* route, double us) {
    if (us > 0) text << (text.tellp() > 0 ? ", " : "") << route << " " << us << " us";
  };
  tell("library", library), tell("hybrid", hybrid), tell("kernels", kernel);
  return text.str();
}

std::string Plan::describe() const {
  const std::string times = predicted.describe();
  std::string text = !has_kernels() ? "library: " : hybrid() ? "hybrid: " : "kernels: ";
  text += reason + (times.empty() ? "" : "\n  predicted: " + times);
  if (!has_kernels()) return text;
  text += "\n";
  if (tiled() != nullptr)
    text += tiled()->tables ? describe_many(*tiled()) : describe_one(*tiled());
  if (decode() != nullptr) text += describe_decode(*decode());
  return text + "  workspace " + number(workspace, "bytes");
}

}  // namespace lora_ext::plan
