// Describes a plan in words.
#include <iomanip>
#include <sstream>

#include "kernels/plan/plan.h"

namespace lora_ext::plan {
namespace {

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
