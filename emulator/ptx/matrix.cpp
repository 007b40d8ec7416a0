// ldmatrix, stmatrix and mma.sync, on the fragments of matrix/layouts.h.
#include <algorithm>

#include "emulator/counts/counters.h"
#include "emulator/matrix/formats.h"
#include "emulator/matrix/layouts.h"
#include "emulator/ptx/loops.h"

namespace emulator::ptx {
namespace {

// mode: transposed.
Step load_matrices(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  const auto count = static_cast<uint32_t>(o.list.size());
  uint16_t elements[4][8][8];
  bool defined[4][8];
  uint32_t banks[8];
  for (uint32_t lane = 0; lane < count * 8; ++lane) {
    if (warp.undefined[o.a] >> lane & 1)
      fail_at(warp, o, ErrorKind::Uninitialised, format("lane %u has an undefined address", lane));
    const uint32_t address = warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset);
    const Place place = shared_place(warp, o, address, 16, 16);
    const std::string wrong = place.block->shadow.read(place.offset, 16, accessor(warp, lane));
    if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
    std::memcpy(elements[lane / 8][lane % 8], place.block->shared.data() + place.offset, 16);
    banks[lane % 8] = place.offset;
    if (lane % 8 == 7) count_matrix_phase(banks);
    defined[lane / 8][lane % 8] = place.block->shadow.defined(place.offset, 16);
  }
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t undefined = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      uint32_t value = 0;
      for (uint32_t half = 0; half < 2; ++half) {
        const Position at = o.mode ? matrix_8x8_transposed(lane, half) : matrix_8x8(lane, half);
        value |= uint32_t{elements[i][at.row][at.col]} << 16 * half;
        undefined |= uint32_t{!defined[i][at.row]} << lane;
      }
      warp.lanes_of<uint32_t>(o.list[i])[lane] = value;
    }
    warp.undefined[o.list[i]] = undefined;
  }
  return Step::kNext;
}

Step store_matrices(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  for (uint32_t i = 0; i < o.list.size(); ++i) {
    uint16_t elements[8][8];
    uint32_t banks[8];
    bool defined[8] = {true, true, true, true, true, true, true, true};
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      for (uint32_t half = 0; half < 2; ++half) {
        const Position at = o.mode ? matrix_8x8_transposed(lane, half) : matrix_8x8(lane, half);
        elements[at.row][at.col] =
            static_cast<uint16_t>(warp.lanes_of<uint32_t>(o.list[i])[lane] >> 16 * half);
        if (warp.undefined[o.list[i]] >> lane & 1) defined[at.row] = false;
      }
    }
    for (uint32_t row = 0; row < 8; ++row) {
      const uint32_t lane = 8 * i + row;
      const uint32_t address = warp.lanes_of<uint32_t>(o.a)[lane] + static_cast<uint32_t>(o.offset);
      const Place place = shared_place(warp, o, address, 16, 16);
      const std::string wrong = place.block->shadow.write(place.offset, 16, accessor(warp, lane));
      if (!wrong.empty()) fail_at(warp, o, ErrorKind::Race, wrong);
      std::memcpy(place.block->shared.data() + place.offset, elements[row], 16);
      banks[row] = place.offset;
      place.block->shadow.set_defined(place.offset, 16, defined[row]);
    }
    count_matrix_phase(banks);
  }
  return Step::kNext;
}

Maker matrices(Run run, bool loads, size_t count, bool transposed) {
  return [=](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, 2);
    const Operand& registers = statement.operands[loads ? 0 : 1];
    if (registers.parts.size() != count) decoder.refuse("expected as many registers as matrices");
    for (const Operand& each : registers.parts)
      made.list.push_back(loads ? decoder.result(each, 32) : decoder.source(each, 32));
    decoder.address(statement.operands[loads ? 1 : 0], made, 32);
    made.run = run, made.mode = transposed;
  };
}

// mma.m16n8k16 in fp32, in one order: list is d[4], a[4], b[2], c[4].
template <Format kFormat>
Step multiply(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  count_mma(2 * 16 * 8 * 16);
  float a[16][16], b[16][8], d[16][8];
  for (uint32_t reg = 0; reg < 4; ++reg) {
    const uint32_t* words = warp.lanes_of<uint32_t>(o.list[4 + reg]);
    const float* sums = warp.lanes_of<float>(o.list[10 + reg]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const Position at = mma_a(lane, reg, 0), c = mma_c(lane, reg);
      a[at.row][at.col] = to_float(kFormat, static_cast<uint16_t>(words[lane]));
      a[at.row][at.col + 1] = to_float(kFormat, static_cast<uint16_t>(words[lane] >> 16));
      d[c.row][c.col] = sums[lane];
    }
  }
  for (uint32_t reg = 0; reg < 2; ++reg) {
    const uint32_t* words = warp.lanes_of<uint32_t>(o.list[8 + reg]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const Position at = mma_b(lane, reg, 0);
      b[at.row][at.col] = to_float(kFormat, static_cast<uint16_t>(words[lane]));
      b[at.row + 1][at.col] = to_float(kFormat, static_cast<uint16_t>(words[lane] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    std::copy_n(d[row], 8, sums);
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < 8; ++col) sums[col] += a[row][k] * b[k][col];
    std::copy_n(sums, 8, d[row]);
  }
  // What is undefined is NaN, and so is what it is multiplied into.
  for (uint32_t reg = 0; reg < 4; ++reg) {
    float* sums = warp.lanes_of<float>(o.list[reg]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const Position c = mma_c(lane, reg);
      sums[lane] = d[c.row][c.col];
    }
    warp.undefined[o.list[reg]] = 0;
  }
  return Step::kNext;
}

}  // namespace

void add_matrix(Table& table) {
  for (const bool transposed : {false, true}) {
    for (const size_t count : {1, 2, 4}) {
      const std::string rest = ".sync.aligned.m8n8.x" + std::to_string(count) +
                               (transposed ? ".trans" : "") + ".shared.b16";
      table["ldmatrix" + rest] = matrices(load_matrices, true, count, transposed);
      table["stmatrix" + rest] = matrices(store_matrices, false, count, transposed);
    }
  }
  for (const bool bf16 : {true, false}) {
    const std::string type = bf16 ? "bf16" : "f16";
    table["mma.sync.aligned.m16n8k16.row.col.f32." + type + "." + type + ".f32"] =
        [=](Decoder& decoder, const Statement& statement, Operation& made) {
          decoder.demand_operands(statement, 4);
          const size_t sizes[] = {4, 4, 2, 4};
          for (size_t i = 0; i < 4; ++i) {
            const std::vector<Operand>& parts = statement.operands[i].parts;
            if (parts.size() != sizes[i]) decoder.refuse("expected 4, 4, 2 and 4 registers");
            for (const Operand& each : parts)
              made.list.push_back(i == 0 ? decoder.result(each, 32) : decoder.source(each, 32));
          }
          made.run = bf16 ? multiply<Format::kBFloat16> : multiply<Format::kFloat16>;
        };
  }
}

}  // namespace emulator::ptx
