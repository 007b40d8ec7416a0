// The kernel route's device in the emulated package: CPU tensors, kernels in the execution layer.
//
// LORA_EXT_EMULATED_FAULT plants a mutant. LORA_EXT_EMULATED_CAPTURE=1 simulates the capture of a
// graph. LORA_EXT_EMULATED_ARCH is the card, 80 by default. LORA_EXT_EMULATED_HANG simulates
// kernels that never end, as seen by "wait", or in "launch". LORA_EXT_EMULATED_THROW simulates a
// failing launch: out of "memory", an "error" of torch, or the "end" of the process.
#include "kernels/device.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "emulated/kernels/lora_experts.h"
#include "emulated/kernels/lora_grouped_sequence.h"
#include "emulated/kernels/lora_linear_sequence.h"
#include "emulated/mutants/known_fault.h"
#include "emulator/fault.h"
#include "emulator/machine/config.h"
#include "emulator/machine/fail.h"
#include "kernels/dequantize.h"
#include "kernels/dropout.h"
#include "kernels/lora_experts.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {
namespace {

constexpr int kSms = 8;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Runs one direction; an error of the layer becomes that of a launch. One call at a time: the layer
// has one machine.
template <class Run>
std::string run(const Run& enqueue) {
  static std::mutex one_machine;
  const std::lock_guard lock(one_machine);
  emulator::Config& config = emulator::config();
  config.schedule = emulator::Schedule::RunAhead;
  config.completion = emulator::Completion::Late;
  config.resident_clusters = 8;
  if (environment("LORA_EXT_EMULATED_HANG") == "launch")
    std::this_thread::sleep_for(std::chrono::hours(1));
  const std::string thrown = environment("LORA_EXT_EMULATED_THROW");
  TORCH_CHECK_WITH(OutOfMemoryError, thrown != "memory", "out of emulated memory");
  TORCH_CHECK(thrown != "error", "an emulated error");
  if (thrown == "end") std::abort();
  const std::string fault = environment("LORA_EXT_EMULATED_FAULT");
  emulated::plant_known_fault(fault.c_str());
  try {
    emulator::Stream stream;
    enqueue(stream);
    stream.synchronize();
  } catch (const emulator::Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

bool is_built() { return true; }

// Called before a call is planned, so that a mutant of the planning is planted in time.
bool has_kernels(bool) {
  emulated::plant_known_fault(environment("LORA_EXT_EMULATED_FAULT").c_str());
  return true;
}

plan::Card card_of(int) {
  const std::string arch = environment("LORA_EXT_EMULATED_ARCH");
  const int number = arch.empty() ? 80 : std::stoi(arch);
  const std::string name = "emulated sm_" + std::to_string(number);
  if (number == 86) return {86, 16, 102400, 101376, name};
  if (number == 90) return {90, kSms, 233472, 232448, name};
  return {number, kSms, 167936, 166912, name};
}

std::string driver() { return "none"; }

// Every launch runs to its end.
std::optional<std::string> wait(void*, double seconds) {
  const bool ends = environment("LORA_EXT_EMULATED_HANG") != "wait" || std::isinf(seconds);
  return ends ? std::optional<std::string>("") : std::nullopt;
}

// One stream.
std::optional<uint64_t> stream_id(void*) { return 1; }

uint32_t* permanent_zeros(int64_t count, void*) {
  return static_cast<uint32_t*>(std::calloc(static_cast<size_t>(count), sizeof(uint32_t)));
}

bool is_capturing(void*) { return environment("LORA_EXT_EMULATED_CAPTURE") == "1"; }

template <>
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraLinearForward& operands, void*) {
  return run([&](emulator::Stream& stream) {
    dtype == Dtype::kBFloat16 ? kernel::forward<__nv_bfloat16>(stream, plan, operands, kSms / 2)
                              : kernel::forward<__half>(stream, plan, operands, kSms / 2);
  });
}

template <>
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraLinearBackward& operands, void*) {
  return run([&](emulator::Stream& stream) {
    dtype == Dtype::kBFloat16 ? kernel::backward<__nv_bfloat16>(stream, plan, operands, kSms / 2)
                              : kernel::backward<__half>(stream, plan, operands, kSms / 2);
  });
}

template <>
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraGroupedForward& operands, void*) {
  return run([&](emulator::Stream& stream) {
    dtype == Dtype::kBFloat16 ? kernel::grouped_forward<__nv_bfloat16>(stream, plan, operands)
                              : kernel::grouped_forward<__half>(stream, plan, operands);
  });
}

template <>
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraGroupedBackward& operands, void*) {
  return run([&](emulator::Stream& stream) {
    dtype == Dtype::kBFloat16 ? kernel::grouped_backward<__nv_bfloat16>(stream, plan, operands)
                              : kernel::grouped_backward<__half>(stream, plan, operands);
  });
}

std::string launch_experts(Dtype dtype, const kernel::ExpertsParams& params, void*) {
  return run([&](emulator::Stream& stream) {
    dtype == Dtype::kBFloat16 ? kernel::launch_experts<__nv_bfloat16>(stream, params)
                              : kernel::launch_experts<__half>(stream, params);
  });
}

// For CUDA tensors, which do not exist here.
std::string launch_dropout(Dtype, const DropoutParams&, void*) { std::abort(); }
std::string launch_dequantize(Dtype, const kernel::DequantizeParams&, void*) { std::abort(); }

}  // namespace lora_ext::cuda
