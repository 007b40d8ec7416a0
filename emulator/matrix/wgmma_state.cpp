// Registers, operands and exit checks of wgmmas in flight; see wgmma_state.h.
#include "emulator/matrix/wgmma_state.h"

#include <algorithm>
#include <cstring>

#include "emulator/counts/counters.h"
#include "emulator/machine/config.h"
#include "emulator/matrix/layouts.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/race/race.h"

namespace emulator {
namespace {

constexpr const char* kOperand = "wgmma.mma_async operand";

// Calls f(position in [16, n], register of the lane) for each accumulator of `lane`.
template <typename F>
void for_each_register(int n, uint32_t lane, F&& f) {
  for (int reg = 0; reg < n / 2; ++reg) {
    const Position at = wgmma_d(lane, static_cast<uint32_t>(reg));
    f(at.row * static_cast<uint32_t>(n) + at.col, reg);
  }
}

void unpack_fragments(const WgmmaOperation& operation, float* a_values) {
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    for (uint32_t reg = 0; reg < 4; ++reg) {
      for (uint32_t half = 0; half < 2; ++half) {
        const Position at = wgmma_a(lane, reg, half);
        const auto bits = static_cast<uint16_t>(operation.a_fragments[lane][reg] >> 16 * half);
        a_values[at.col * kWarpRows + at.row] = to_float(operation.shape.format, bits);
      }
    }
  }
}

}  // namespace

bool WgmmaRegisters::overlaps(const WgmmaRegisters& other) const {
  return lanes[0] < other.lanes[0] + other.n / 2 && other.lanes[0] < lanes[0] + n / 2;
}

// The arrays of an earlier wait may be out of scope by now, which is no fault: their stack is
// mapped, and only an array that is accumulated into again is compared.
__attribute__((no_sanitize("address"))) uint64_t WgmmaRegisters::hash() const {
  uint64_t hash = 0xCBF29CE484222325;
  for (const float* registers : lanes) {
    for (int reg = 0; reg < n / 2; ++reg) {
      const float value = registers[reg];
      hash = (hash ^ __builtin_bit_cast(uint32_t, value)) * 0x100000001B3;
    }
  }
  return hash;
}

void WgmmaAccumulator::take_from_registers() {
  values.resize(static_cast<size_t>(kWarpRows * registers.n));
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    float* source = registers.lanes[lane];
    for_each_register(registers.n, lane, [&](uint32_t at, int reg) { values[at] = source[reg]; });
    poison(source, sizeof(float) * static_cast<size_t>(registers.n / 2));
  }
}

void WgmmaAccumulator::give_to_registers(uint32_t lane) const {
  float* destination = registers.lanes[lane];
  if (machine().config.poison) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(destination);
    const size_t size = sizeof(float) * static_cast<size_t>(registers.n / 2);
    if (!std::all_of(bytes, bytes + size, [](unsigned char b) { return b == kPoisonByte; })) {
      fail(ErrorKind::Misuse,
           "wgmma.wait_group: accumulator registers were written while a wgmma was using them; "
           "wait before touching them");
    }
  }
  for_each_register(registers.n, lane,
                    [&](uint32_t at, int reg) { destination[reg] = values[at]; });
}

bool WgmmaOperation::same_instruction(const WgmmaOperation& other) const {
  return shape == other.shape && a_in_registers == other.a_in_registers && a == other.a &&
         b == other.b && accumulate == other.accumulate;
}

std::string WgmmaOperation::describe() const {
  return format("m64n%dk16 %s, a %s 0x%llx, b 0x%llx, %s", shape.n,
                shape.format == Format::kBFloat16 ? "bf16" : "f16",
                a_in_registers ? "in registers" : "descriptor", static_cast<unsigned long long>(a),
                static_cast<unsigned long long>(b), accumulate ? "accumulating" : "overwriting");
}

void WgmmaOperation::execute(Warp& warp) const {
  alignas(64) float a_values[kWgmmaK * kWarpRows], b_values[kWgmmaK * kMaxN];
  Block& block = *warp.block;
  count_wgmma(uint64_t{2} * kWarpRows * static_cast<uint32_t>(shape.n) * kWgmmaK);
  const auto chunk = [&](uint32_t address) {
    const unsigned char* pointer = shared_of(block, address, 16, 16, kOperand);
    race_async_read(agent, pointer, 16, kOperand);
    return pointer;
  };
  if (a_in_registers) {
    unpack_fragments(*this, a_values);
  } else {
    const int first_row = kWarpRows * static_cast<int>(warp.index % kWarpgroupWarps);
    read_operand(decode_descriptor(a), shape.major_a, shape.format, first_row, kWarpRows, chunk,
                 a_values);
  }
  read_operand(decode_descriptor(b), shape.major_b, shape.format, 0, shape.n, chunk, b_values);

  std::vector<float>& d = accumulator->values;
  if (!accumulate) std::fill(d.begin(), d.end(), 0.0f);
  multiply_accumulate(a_values, b_values, d.data(), shape.n);
}

bool WgmmaLoadedRegisters::overlaps(const WgmmaOperation& operation) const {
  if (!operation.a_in_registers) return false;
  const uint32_t* const fragment = operation.a_registers[0];
  return lanes[0] < fragment + 4 && fragment < lanes[0] + count;
}

std::string WgmmaCompletion::describe() const {
  return format(
      "wgmma group %llu of warpgroup %u: committed by %u and executed in %u of four warps",
      static_cast<unsigned long long>(index), warpgroup, warps_committed, shares_executed);
}

void WarpWgmma::thread_exits(Thread& thread) {
  if (!open.empty()) {
    fail(ErrorKind::ExitCheck,
         "the thread exits with %zu wgmmas in no group; expected wgmma_commit_group and "
         "wgmma_wait_group<0>",
         open.size());
  }
  if (waited_for[thread.lane] != committed) {
    fail(ErrorKind::ExitCheck, "the thread exits without wgmma_wait_group<0>: %s",
         groups.back()->completion->describe().c_str());
  }
}

WarpWgmma& wgmma_state(Warp& warp) {
  if (!warp.wgmma) warp.wgmma = std::make_unique<WarpWgmma>();
  return static_cast<WarpWgmma&>(*warp.wgmma);
}

}  // namespace emulator
