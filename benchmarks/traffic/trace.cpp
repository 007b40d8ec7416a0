// The global memory that kernels ask for, and what of it reaches DRAM under a model of L2: the
// plans' kernels walk over their tiles without computing.
//
//     trace M K N RANK [L2_MIB]      one line of JSON for each direction and variant
//
// Blocks that are resident together advance in turns, a step of 64 each. cp.async goes past L1, so
// each request reaches L2. Variants, all in bfloat16 with bfloat16 adapters, no dropout:
//
//     merged   the product alone, by our kernel without a low-rank part
//     ours     the plan's kernels
//     naive    base, x A^T, S B^T, times s, plus: five passes, the two skinny products ideal (each
//              operand read once), the base as in merged; backward likewise, as autograd runs it
#include <cstdio>
#include <cstdlib>
#include <string>

#include "benchmarks/traffic/trace_memory.h"

namespace {

namespace plan = lora_ext::plan;
using namespace trace;

// The low-rank factors of a product; none has no rows.
struct Factors {
  Matrix t{}, u{};
};

// lora_gemm with its raster (kernel/lora_gemm_sm80.h): Y = P Q + T U.
void gemm(Memory& memory, const plan::Gemm& planned, const Matrix& p, const Matrix& q,
          bool mn_major, const Factors& low_rank, const Matrix& y) {
  const plan::TileFacts& tile = plan::kTiles[static_cast<int>(planned.tile)];
  const int64_t row_tiles = blocks_of(y.rows, tile.rows);
  const int64_t column_tiles = blocks_of(y.columns, tile.columns);
  const int64_t main_steps = blocks_of(p.columns, kStep);
  const int64_t steps = main_steps + blocks_of(low_rank.t.columns, kStep);
  const auto load = [&](const Matrix& left, const Matrix& right, int64_t row, int64_t column,
                        int64_t k) {
    memory.read(left, row, tile.rows, k, kStep);
    if (mn_major) {
      memory.read(right, k, kStep, column, tile.columns);
    } else {
      memory.read(right, column, tile.columns, k, kStep);
    }
  };
  run(planned.blocks, planned.blocks, [&](int64_t block) -> Block {
    return [&, block](int64_t step) {
      const int64_t index = block + step / steps * planned.blocks;
      if (index >= row_tiles * column_tiles) return false;
      constexpr int64_t kGroup = 8;
      const int64_t first = index / (kGroup * column_tiles) * kGroup;
      const int64_t height = std::min(kGroup, row_tiles - first);
      const int64_t within = index - first * column_tiles;
      const int64_t row = (first + within % height) * tile.rows;
      const int64_t column = within / height * tile.columns, at = step % steps;
      if (at < main_steps) {
        load(p, q, row, column, at * kStep);
      } else {
        load(low_rank.t, low_rank.u, row, column, (at - main_steps) * kStep);
      }
      if (at == steps - 1) memory.write(y, row, tile.rows, column, tile.columns);
      return true;
    };
  });
}

// lora_shrink: Z[split] = X A^T.
void shrink(Memory& memory, const plan::Splits& splits, const Matrix& x, const Matrix& a,
            bool mn_major, const Matrix& z, int64_t columns) {
  const int64_t row_tiles = blocks_of(x.rows, 64), column_tiles = blocks_of(columns, 64);
  run(row_tiles * column_tiles * splits.splits, 3 * kCard.sms, [&](int64_t block) -> Block {
    const int64_t row = block % row_tiles * 64, column = block / row_tiles % column_tiles * 64;
    const int64_t split = block / (row_tiles * column_tiles);
    return [&, row, column, split](int64_t step) {
      const int64_t k = (split * splits.steps_per_split + step) * kStep;
      if (step >= splits.steps_per_split || k >= x.columns) {
        memory.write(z, split * x.rows + row, 64, column, 64);
        return false;
      }
      memory.read(x, row, 64, k, kStep);
      if (mn_major) {
        memory.read(a, k, kStep, column, 64);
      } else {
        memory.read(a, column, 64, k, kStep);
      }
      return true;
    };
  });
}

// lora_wgrad: G[split]^T = P^T U, one product.
void wgrad(Memory& memory, const plan::Splits& splits, const Matrix& p, const Matrix& u,
           const Matrix& g) {
  const int64_t tiles = blocks_of(p.columns, 128), column_tiles = blocks_of(u.columns, 64);
  run(tiles * column_tiles * splits.splits, 2 * kCard.sms, [&](int64_t block) -> Block {
    const int64_t c = block % tiles * 128, column = block / tiles % column_tiles * 64;
    const int64_t split = block / (tiles * column_tiles);
    return [&, c, column, split](int64_t step) {
      const int64_t row = (split * splits.steps_per_split + step) * kStep;
      if (step >= splits.steps_per_split || row >= p.rows) {
        memory.write(g, split * u.columns + column, std::min<int64_t>(64, u.columns - column), c,
                     128);
        return false;
      }
      memory.read(p, row, kStep, c, 128);
      memory.read(u, row, kStep, column, 64);
      return true;
    };
  });
}

// lora_dsdb: Z[panel] = dY B and G[split]^T = dY^T (s S).
void dsdb(Memory& memory, const plan::Plan& planned, const Matrix& dy, const Matrix& b,
          const Matrix& s, const Matrix& z, const Matrix& g) {
  const int64_t width = 16384 / (planned.columns <= 16 ? 16 : 32);
  const plan::Splits& splits = planned.dlora_b;
  run(planned.panels * splits.splits, kCard.sms, [&](int64_t block) -> Block {
    const int64_t panel = block % planned.panels, split = block / planned.panels;
    return [&, panel, split](int64_t turn) {
      const int64_t n0 = panel * width;
      const int64_t chunks = std::min(blocks_of(dy.columns - n0, 128), width / 128);
      const int64_t step = turn / chunks, chunk = turn % chunks;
      const int64_t row = (split * splits.steps_per_split + step) * kStep;
      if (turn == 0) memory.read(b, n0, width, 0, b.columns);
      if (step >= splits.steps_per_split || row >= dy.rows) {
        memory.write(g, split * s.columns, s.columns, n0, width);
        return false;
      }
      if (chunk == 0) memory.read(s, row, kStep, 0, s.columns);
      memory.read(dy, row, kStep, n0 + chunk * 128, 128);
      if (chunk == chunks - 1)
        memory.write(z, panel * dy.rows + row, std::min(kStep, dy.rows - row), 0, z.columns);
      return true;
    };
  });
}

struct Shape {
  int64_t m, k, n, rank;
  plan::Problem problem() const { return {.m = m, .n = n, .k = k, .rank = rank}; }
};

void forward(const Shape& s, size_t l2, const std::string& variant) {
  Memory memory(l2);
  const Matrix x = memory.allocate(s.m, s.k, 2), w = memory.allocate(s.n, s.k, 2);
  const Matrix a = memory.allocate(s.rank, s.k, 2), b = memory.allocate(s.n, s.rank, 2);
  const Matrix y = memory.allocate(s.m, s.n, 2), half = memory.allocate(s.m, s.rank, 2);
  const plan::Plan planned = plan::forward(kCard, s.problem(), {plan::Choice::kKernel});
  if (variant == "ours") {
    const Matrix z = memory.allocate(planned.shrink.splits * s.m, planned.z_columns, 4);
    const Matrix saved = memory.allocate(s.m, s.rank, 4);
    shrink(memory, planned.shrink, x, a, false, z, planned.z_columns);
    memory.stream({z}, {saved, half});
    gemm(memory, planned.gemm, x, w, false, {half, b}, y);
  } else {
    gemm(memory, planned.gemm, x, w, false, {}, y);
  }
  if (variant == "naive") {
    const Matrix delta = memory.allocate(s.m, s.n, 2), scaled = memory.allocate(s.m, s.n, 2);
    memory.stream({x, a}, {half});
    memory.stream({half, b}, {delta});
    memory.stream({delta}, {scaled});
    memory.stream({y, scaled}, {memory.allocate(s.m, s.n, 2)});
  }
  memory.report("forward", variant.c_str(), a.bytes() + b.bytes(), x.bytes());
}

void backward(const Shape& s, size_t l2, const std::string& variant) {
  Memory memory(l2);
  const Matrix x = memory.allocate(s.m, s.k, 2), w = memory.allocate(s.n, s.k, 2);
  const Matrix a = memory.allocate(s.rank, s.k, 2), b = memory.allocate(s.n, s.rank, 2);
  const Matrix dy = memory.allocate(s.m, s.n, 2), dx = memory.allocate(s.m, s.k, 2);
  const Matrix saved = memory.allocate(s.m, s.rank, variant == "ours" ? 4 : 2);
  const Matrix da = memory.allocate(s.rank, s.k, 2), db = memory.allocate(s.n, s.rank, 2);
  const plan::Plan planned = plan::backward(kCard, s.problem(), {plan::Choice::kKernel});
  const Matrix half = memory.allocate(s.m, planned.columns, 2);
  if (variant == "merged") {
    gemm(memory, planned.gemm, dy, w, true, {}, dx);
  } else if (variant == "ours") {
    const int64_t sums = planned.one_pass ? planned.panels : planned.shrink.splits;
    const Matrix z = memory.allocate(sums * s.m, planned.columns, 4);
    const Matrix ds = memory.allocate(s.m, planned.columns, 2);
    const Matrix g_b = memory.allocate(planned.dlora_b.splits * planned.columns, s.n, 4);
    const Matrix g_a = memory.allocate(planned.dlora_a.splits * planned.columns, s.k, 4);
    memory.stream({saved}, {half});
    if (planned.one_pass) {
      dsdb(memory, planned, dy, b, half, z, g_b);
    } else {
      shrink(memory, planned.shrink, dy, b, true, z, planned.columns);
    }
    memory.stream({z}, {ds});
    gemm(memory, planned.gemm, dy, w, true, {ds, a}, dx);
    wgrad(memory, planned.dlora_a, x, ds, g_a);
    if (!planned.one_pass) wgrad(memory, planned.dlora_b, dy, half, g_b);
    memory.stream({g_a, g_b}, {da, db});
  } else {
    const Matrix scaled = memory.allocate(s.m, s.n, 2), delta = memory.allocate(s.m, s.k, 2);
    memory.stream({dy}, {scaled});
    memory.stream({scaled, saved}, {db});
    memory.stream({scaled, b}, {half});
    memory.stream({half, x}, {da});
    memory.stream({half, a}, {delta});
    gemm(memory, planned.gemm, dy, w, true, {}, dx);
    memory.stream({dx, delta}, {memory.allocate(s.m, s.k, 2)});
  }
  memory.report("backward", variant.c_str(), a.bytes() + b.bytes(), dy.bytes() + x.bytes());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: trace M K N RANK [L2_MIB]\n");
    return 2;
  }
  const Shape shape{std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                    std::atoll(argv[4])};
  const size_t l2 = (argc > 5 ? std::strtoull(argv[5], nullptr, 10) : 40) << 20;
  for (const char* variant : {"merged", "ours", "naive"}) {
    forward(shape, l2, variant);
    backward(shape, l2, variant);
  }
}
