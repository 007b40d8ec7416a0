// Matrices in global memory, the requests for them and what of it reaches DRAM under a model of L2;
// and blocks that are resident together, which advance in turns.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "emulator/counts/l2_model.h"
#include "emulator/machine/fail.h"
#include "plan/plan.h"

// All that the model, a file of its own, needs of the execution layer. A program includes this
// once.
void emulator::fail(ErrorKind, const char* format, ...) {
  std::fprintf(stderr, "trace: %s\n", format);
  std::exit(1);
}

namespace trace {

inline const lora_ext::plan::Card kCard{80, 108, 167936, 166912};  // A100
inline constexpr int64_t kStep = 64;

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Matrix {
  uint64_t base;
  int64_t rows, columns, size;  // of an element, in bytes
  int64_t bytes() const { return rows * columns * size; }
};

class Memory {
 public:
  explicit Memory(size_t l2_bytes) : l2_({l2_bytes, 0}) {}

  Matrix allocate(int64_t rows, int64_t columns, int64_t size) {
    const Matrix matrix{next_, rows, columns, size};
    next_ += (static_cast<uint64_t>(matrix.bytes()) + 1023) / 1024 * 1024;
    return matrix;
  }
  // Rows [row, row + rows), columns [column, column + columns), as far as they are there.
  void read(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    each_row(m, row, rows, column, columns, [&](uint64_t address, size_t bytes) {
      l2_.read(address, bytes);
      requested_read_ += bytes;
    });
  }
  void write(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    each_row(m, row, rows, column, columns, [&](uint64_t address, size_t bytes) {
      l2_.write(address, bytes);
      requested_write_ += bytes;
    });
  }
  // An element-wise kernel or an ideal skinny product: all read, all written, evenly in time.
  void stream(const std::vector<Matrix>& reads, const std::vector<Matrix>& writes) {
    constexpr int64_t kParts = 4096;
    for (int64_t part = 0; part < kParts; ++part) {
      for (const Matrix& m : reads)
        touch_part(m, part, kParts, requested_read_, [&](auto a, auto b) { l2_.read(a, b); });
      for (const Matrix& m : writes)
        touch_part(m, part, kParts, requested_write_, [&](auto a, auto b) { l2_.write(a, b); });
    }
  }
  uint64_t requested() const { return requested_read_ + requested_write_; }
  // What reached DRAM, with all that is dirty written back.
  uint64_t dram() {
    l2_.flush();
    return l2_.traffic().dram_read_bytes + l2_.traffic().dram_write_bytes;
  }
  void report(const char* direction, const char* variant, int64_t adapters, int64_t passes) {
    std::printf(
        "{\"direction\": \"%s\", \"variant\": \"%s\", \"requested\": %llu, \"dram\": %llu, "
        "\"adapters\": %lld, \"passes\": %lld}\n",
        direction, variant, static_cast<unsigned long long>(requested()),
        static_cast<unsigned long long>(dram()), static_cast<long long>(adapters),
        static_cast<long long>(passes));
  }

 private:
  template <class Touch>
  static void each_row(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       const Touch& touch) {
    const int64_t last_row = std::min(row + rows, m.rows);
    const int64_t last_column = std::min(column + columns, m.columns);
    if (column >= last_column) return;
    for (int64_t i = row; i < last_row; ++i) {
      touch(m.base + static_cast<uint64_t>((i * m.columns + column) * m.size),
            static_cast<size_t>((last_column - column) * m.size));
    }
  }
  template <class Touch>
  static void touch_part(const Matrix& m, int64_t part, int64_t parts, uint64_t& count,
                         const Touch& touch) {
    const int64_t lines = blocks_of(m.bytes(), 128);
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
      const auto bytes = static_cast<size_t>(std::min<int64_t>(128, m.bytes() - line * 128));
      touch(m.base + static_cast<uint64_t>(line * 128), bytes);
      count += bytes;
    }
  }

  emulator::L2Model l2_;
  uint64_t next_ = 1 << 20, requested_read_ = 0, requested_write_ = 0;
};

// A block's steps, in order; false past the last.
using Block = std::function<bool(int64_t step)>;

inline void run(int64_t blocks, int64_t resident, const std::function<Block(int64_t)>& block) {
  struct Running {
    Block steps;
    int64_t next = 0;
  };
  std::vector<Running> running;
  int64_t started = 0;
  while (started < blocks || !running.empty()) {
    while (started < blocks && static_cast<int64_t>(running.size()) < resident)
      running.push_back({block(started++)});
    std::erase_if(running, [](Running& each) { return !each.steps(each.next++); });
  }
}

}  // namespace trace
