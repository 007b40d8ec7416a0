#include "emulator/matrix/matrix_move.h"

#include <cstring>

#include "emulator/counts/counters.h"
#include "emulator/matrix/layouts.h"
#include "emulator/matrix/wgmma_state.h"
#include "emulator/memory/shared_memory.h"
#include "emulator/race/race.h"
#include "emulator/threads/warp.h"

namespace emulator {
namespace {

constexpr uint32_t kRowBytes = 16;

// Operands of a lane: the row that it addresses (null past the last matrix), and its registers.
struct LoadOperand {
  const unsigned char* row;
  uint32_t address;
  uint32_t* registers;
};
struct StoreOperand {
  unsigned char* row;
  uint32_t address;
  const uint32_t* registers;
};

Position element_position(bool transposed, uint32_t lane, uint32_t half) {
  return transposed ? matrix_8x8_transposed(lane, half) : matrix_8x8(lane, half);
}

// Lanes of one warp must agree on these.
uint64_t immediate_of(uint32_t count, bool transposed) { return count * 2 + transposed; }

}  // namespace

void ldmatrix(uint32_t count, bool transposed, uint32_t* registers, uint32_t address) {
  constexpr const char* kName = "ldmatrix";
  LoadOperand operand{nullptr, address, registers};
  if (matrix_of_address(lane_index()) < count) {
    operand.row = own_shared(address, kRowBytes, kRowBytes, kName);
    race_read(operand.row, kRowBytes, kName);
  }
  const auto load = [=](const LaneOperands<LoadOperand>& lanes) {
    WgmmaLoadedRegisters loaded;
    loaded.count = count;
    lanes.for_each([&](uint32_t lane, const LoadOperand& o) { loaded.lanes[lane] = o.registers; });
    wgmma_registers_loaded(lanes.warp, loaded);
    for (uint32_t j = 0; j < count; ++j) {
      uint16_t matrix[8][8];
      uint32_t addresses[8];
      for (uint32_t row = 0; row < 8; ++row) {
        const LoadOperand& source = lanes[8 * j + row];
        std::memcpy(matrix[row], source.row, kRowBytes);
        addresses[row] = source.address;
      }
      count_matrix_phase(addresses);
      lanes.for_each([&](uint32_t lane, const LoadOperand& target) {
        uint32_t value = 0;
        for (uint32_t half = 0; half < 2; ++half) {
          const Position at = element_position(transposed, lane, half);
          value |= static_cast<uint32_t>(matrix[at.row][at.col]) << 16 * half;
        }
        target.registers[j] = value;
      });
    }
  };
  warp_collective(aligned_mask(kName), kName, immediate_of(count, transposed), operand, load);
}

void stmatrix(uint32_t address, const uint32_t* registers) {
  constexpr const char* kName = "stmatrix";
  constexpr uint32_t kCount = 4;
  StoreOperand operand{nullptr, address, registers};
  if (matrix_of_address(lane_index()) < kCount) {
    operand.row = own_shared(address, kRowBytes, kRowBytes, kName);
    race_write(operand.row, kRowBytes, kName);
  }
  const auto store = [=](const LaneOperands<StoreOperand>& lanes) {
    for (uint32_t j = 0; j < kCount; ++j) {
      uint16_t matrix[8][8];
      lanes.for_each([&](uint32_t lane, const StoreOperand& source) {
        for (uint32_t half = 0; half < 2; ++half) {
          const Position at = element_position(false, lane, half);
          matrix[at.row][at.col] = static_cast<uint16_t>(source.registers[j] >> 16 * half);
        }
      });
      uint32_t addresses[8];
      for (uint32_t row = 0; row < 8; ++row) {
        const StoreOperand& target = lanes[8 * j + row];
        std::memcpy(target.row, matrix[row], kRowBytes);
        addresses[row] = target.address;
      }
      count_matrix_phase(addresses);
    }
  };
  warp_collective(aligned_mask(kName), kName, immediate_of(kCount, false), operand, store);
}

}  // namespace emulator
