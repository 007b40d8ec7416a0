// As trace.cpp, for many adapters in one batch, each with a range of rows:
//
//     trace_grouped M K N RANK ADAPTERS [L2_MIB]     one line of JSON for each direction
//
// Each factor is read by the tiles of its own rows; a gradient of one piece is written at once.
#include <cstdlib>

#include "benchmarks/traffic/trace_memory.h"
#include "plan/grouped_plan.h"

namespace {

namespace plan = lora_ext::plan;
using namespace trace;

struct Shape {
  int64_t m, k, n, rank, adapters;
  plan::GroupedProblem problem() const {
    return {{.m = m, .n = n, .k = k, .rank = rank}, adapters};
  }
  int64_t begin(int64_t adapter) const { return m * adapter / adapters; }
};

struct Piece {
  int64_t adapter, begin, count;
};
std::vector<Piece> pieces_of(const Shape& s, int64_t rows) {
  std::vector<Piece> pieces;
  for (int64_t g = 0; g < s.adapters; ++g)
    for (int64_t at = s.begin(g); at < s.begin(g + 1); at += rows)
      pieces.push_back({g, at, std::min(rows, s.begin(g + 1) - at)});
  return pieces;
}

// The factors of all adapters, one below the other: A [adapters * rank, k], B [adapters * n, rank].
struct Factors {
  Matrix all;
  int64_t rows;      // of one
  bool rank_inside;  // B
  // Along its other dimension, of an adapter.
  void read(Memory& memory, int64_t adapter, int64_t at, int64_t count) const {
    if (rank_inside) {
      memory.read(all, adapter * rows + at, std::min(count, rows - at), 0, all.columns);
    } else {
      memory.read(all, adapter * rows, rows, at, count);
    }
  }
};

// lora_grouped_shrink
void shrink(Memory& memory, const Shape& s, const plan::Splits& splits, const Matrix& x,
            const Factors& factors, const Matrix& z) {
  const std::vector<Piece> tiles = pieces_of(s, 64);
  const auto count = static_cast<int64_t>(tiles.size());
  run(count * splits.splits, 3 * kCard.sms, [&](int64_t block) -> Block {
    const Piece& tile = tiles[static_cast<size_t>(block % count)];
    const int64_t split = block / count;
    return [&, tile, split](int64_t step) {
      const int64_t k = (split * splits.steps_per_split + step) * kStep;
      if (step >= splits.steps_per_split || k >= x.columns) {
        memory.write(z, split * x.rows + tile.begin, tile.count, 0, s.rank);
        return false;
      }
      memory.read(x, tile.begin, tile.count, k, kStep);
      factors.read(memory, tile.adapter, k, kStep);
      return true;
    };
  });
}

// lora_grouped_gemm with its raster (kernel/lora_gemm_sm80.h): P Q, then the tile's adapters.
void gemm(Memory& memory, const Shape& s, const plan::Gemm& planned, const Matrix& p,
          const Matrix& q, bool mn_major, const Matrix& t, const Factors& u, const Matrix& y) {
  const plan::TileFacts& tile = plan::facts_of(planned.tile);
  const int64_t row_tiles = blocks_of(y.rows, tile.rows);
  const int64_t column_tiles = blocks_of(y.columns, tile.columns);
  const int64_t main_steps = blocks_of(p.columns, kStep);
  run(planned.blocks, planned.blocks, [&](int64_t block) -> Block {
    return [&, block, index = block, at = int64_t{0}, adapter = int64_t{-1}](int64_t) mutable {
      if (index >= row_tiles * column_tiles) return false;
      constexpr int64_t kGroup = 8;
      const int64_t first = index / (kGroup * column_tiles) * kGroup;
      const int64_t height = std::min(kGroup, row_tiles - first);
      const int64_t within = index - first * column_tiles;
      const int64_t row = (first + within % height) * tile.rows;
      const int64_t end = std::min(row + tile.rows, s.m);
      const int64_t column = within / height * tile.columns;
      if (at < main_steps) {
        memory.read(p, row, tile.rows, at * kStep, kStep);
        if (mn_major) {
          memory.read(q, at * kStep, kStep, column, tile.columns);
        } else {
          memory.read(q, column, tile.columns, at * kStep, kStep);
        }
        ++at;
        adapter = 0;
        while (s.begin(adapter + 1) <= row) ++adapter;
        return true;
      }
      const int64_t begins = std::max(row, s.begin(adapter));
      memory.read(t, begins, std::min(end, s.begin(adapter + 1)) - begins, 0, t.columns);
      u.read(memory, adapter, column, std::min(tile.columns, y.columns - column));
      ++adapter;
      if (adapter == s.adapters || s.begin(adapter) >= end) {
        memory.write(y, row, tile.rows, column, tile.columns);
        index += planned.blocks, at = 0;
      }
      return true;
    };
  });
}

// lora_grouped_wgrad, of one gradient [adapters * rank, c] in halves.
void wgrad(Memory& memory, const Shape& s, int64_t piece_rows, const Matrix& p, const Matrix& u,
           const Matrix& gradient, const Matrix& partial) {
  const std::vector<Piece> pieces = pieces_of(s, piece_rows);
  const auto count = static_cast<int64_t>(pieces.size());
  run(count * blocks_of(p.columns, 128), 2 * kCard.sms, [&](int64_t block) -> Block {
    const Piece& piece = pieces[static_cast<size_t>(block % count)];
    const int64_t c = block / count * 128;
    return [&, piece, c](int64_t step) {
      if (step * kStep >= piece.count) {
        const bool whole = piece.count == s.begin(piece.adapter + 1) - s.begin(piece.adapter);
        memory.write(whole ? gradient : partial, (whole ? piece.adapter : 0) * s.rank, s.rank, c,
                     128);
        return false;
      }
      const int64_t rows = std::min(kStep, piece.count - step * kStep);
      memory.read(p, piece.begin + step * kStep, rows, c, 128);
      memory.read(u, piece.begin + step * kStep, rows, 0, s.rank);
      return true;
    };
  });
}

void forward(const Shape& s, size_t l2) {
  Memory memory(l2);
  const Matrix x = memory.allocate(s.m, s.k, 2), w = memory.allocate(s.n, s.k, 2);
  const Matrix a = memory.allocate(s.adapters * s.rank, s.k, 2);
  const Matrix b = memory.allocate(s.adapters * s.n, s.rank, 2);
  const Matrix y = memory.allocate(s.m, s.n, 2), half = memory.allocate(s.m, s.rank, 2);
  const plan::GroupedPlan planned =
      plan::grouped_forward(kCard, s.problem(), {plan::Choice::kKernel});
  const Matrix z = memory.allocate(planned.one.shrink.splits * s.m, s.rank, 4);
  const Matrix saved = memory.allocate(s.m, s.rank, 4);
  memory.stream({}, {memory.allocate(planned.tile_count + planned.piece_count, 16, 1)});
  shrink(memory, s, planned.one.shrink, x, {a, s.rank, false}, z);
  memory.stream({z}, {saved, half});
  gemm(memory, s, planned.one.gemm, x, w, false, half, {b, s.n, true}, y);
  memory.report("forward", "grouped", a.bytes() + b.bytes(), x.bytes());
}

void backward(const Shape& s, size_t l2) {
  Memory memory(l2);
  const Matrix x = memory.allocate(s.m, s.k, 2), w = memory.allocate(s.n, s.k, 2);
  const Matrix a = memory.allocate(s.adapters * s.rank, s.k, 2);
  const Matrix b = memory.allocate(s.adapters * s.n, s.rank, 2);
  const Matrix dy = memory.allocate(s.m, s.n, 2), dx = memory.allocate(s.m, s.k, 2);
  const Matrix saved = memory.allocate(s.m, s.rank, 4), half = memory.allocate(s.m, s.rank, 2);
  const Matrix ds = memory.allocate(s.m, s.rank, 2);
  const Matrix da = memory.allocate(s.adapters * s.rank, s.k, 2);
  const Matrix db = memory.allocate(s.adapters * s.rank, s.n, 2);
  const plan::GroupedPlan planned =
      plan::grouped_backward(kCard, s.problem(), {plan::Choice::kKernel});
  const Matrix z = memory.allocate(planned.one.shrink.splits * s.m, s.rank, 4);
  const Matrix partial_a = memory.allocate(s.rank, s.k, 4);
  const Matrix partial_b = memory.allocate(s.rank, s.n, 4);
  memory.stream({}, {memory.allocate(planned.tile_count + planned.piece_count, 16, 1)});
  shrink(memory, s, planned.one.shrink, dy, {b, s.n, true}, z);
  memory.stream({z}, {ds});
  memory.stream({saved}, {half});
  gemm(memory, s, planned.one.gemm, dy, w, true, ds, {a, s.rank, false}, dx);
  wgrad(memory, s, planned.piece_rows, x, ds, da, partial_a);
  wgrad(memory, s, planned.piece_rows, dy, half, db, partial_b);
  memory.report("backward", "grouped", a.bytes() + b.bytes(), dy.bytes() + x.bytes());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: trace_grouped M K N RANK ADAPTERS [L2_MIB]\n");
    return 2;
  }
  const Shape shape{std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                    std::atoll(argv[4]), std::atoll(argv[5])};
  const size_t l2 = (argc > 6 ? std::strtoull(argv[6], nullptr, 10) : 40) << 20;
  forward(shape, l2);
  backward(shape, l2);
}
