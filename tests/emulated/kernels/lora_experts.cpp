// Runs the kernels around the products of a mixture's experts on any routes, with slots and experts
// that have nothing, and any widths, types and alignment: the order of the rows, compared with a
// stable sort; the pools of factors; the sums of slots; and the gradients of their weights.
#include "emulated/kernels/lora_experts.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <numeric>

#include "emulated/kernels/driver.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

constexpr double kUnwritten = -12345;

int draw(Random& random, int from, int to) {
  return from + static_cast<int>(random() % static_cast<uint64_t>(to - from + 1));
}

// Of whole chunks, of one element more or less, or any.
int draw_width(Random& random, int most) {
  const int width = draw(random, 1, most), kind = draw(random, 0, 3);
  const int near = kind == 3 ? width : padded(width) + kind - 1;
  return near <= most ? near : width;
}

template <class T>
void launch(const ExpertsParams& params) {
  emulator::Stream stream;
  launch_experts<T>(stream, params);
  run_timed(stream);
}

// What a router chose, and its order. `whole`: as many tokens, slots and experts as may be.
struct Sorted {
  const bool whole;
  const int tokens, slots, experts, rows = tokens * slots;
  const bool is_long;
  std::vector<int64_t> chosen;
  std::vector<int> expert, perm, place, offs;  // expert: `experts` where there is none

  Sorted(const Size& size, Random& random)
      : whole(size.k == 0),
        tokens(!whole && random() % 3 ? draw(random, 1, size.m) : size.m),
        slots(!whole && random() % 3 ? draw(random, 1, 8) : 8),
        experts(!whole && random() % 3 ? draw(random, 1, size.n) : size.n),
        is_long(random() % 2),
        perm(static_cast<size_t>(rows)),
        place(perm),
        offs(static_cast<size_t>(experts)) {
    // Of int64 some whose lower half is an expert's.
    const int64_t nobody[] = {-1,
                              experts,
                              INT_MAX,
                              INT_MIN,
                              is_long ? int64_t{1} << 32 : -2,
                              is_long ? INT64_MIN : experts + 1};
    const int favourite = draw(random, 0, experts - 1), kind = draw(random, 0, 3);
    for (int i = 0; i < rows; ++i) {
      const bool none = kind == 3 ? random() % 4 == 0 : kind == 2 && i % slots == 0;
      chosen.push_back(none                            ? nobody[random() % 6]
                       : kind == 1 && random() % 8 > 0 ? favourite
                                                       : draw(random, 0, experts - 1));
      expert.push_back(none ? experts : static_cast<int>(chosen.back()));
    }
    std::iota(perm.begin(), perm.end(), 0);
    std::stable_sort(perm.begin(), perm.end(), [&](int a, int b) { return expert[a] < expert[b]; });
    for (int i = 0; i < rows; ++i) place[perm[i]] = i;
    for (int e = 0; e < experts; ++e)
      offs[e] = static_cast<int>(
          std::count_if(expert.begin(), expert.end(), [&](int each) { return each <= e; }));
  }
  int count() const { return offs.back(); }  // of positions with an expert
};

void compare_table(const char* name, const GlobalBuffer<int>& got,
                   const std::vector<int>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (got[i] != expected[i])
      differ("%s[%zu]: expected %d, but got %d", name, i, expected[i], got[i]);
}

// Pieces of at most so many rows: each expert's, rows of none if they have some, and empty ones.
void compare_pieces(const char* name, const LoraGroupedPiece* got, int count, const Sorted& sorted,
                    int rows, int per_weight, bool are_summed) {
  std::vector<LoraGroupedPiece> expected;
  const auto add = [&](int expert, int begin, int end, int slot) {
    const int step = slot >= 0 && per_weight == 0;
    for (; begin < end; begin += rows, slot += step)
      expected.push_back({expert, begin, std::min(rows, end - begin), slot});
    return slot;
  };
  int slot = 0;
  for (int e = 0, begin = 0; e < sorted.experts; begin = sorted.offs[e++]) {
    const bool several = are_summed && sorted.offs[e] - begin > rows;
    const int weight = per_weight > 0 ? e / per_weight : -1;
    const int next = add(e, begin, sorted.offs[e], several ? slot : weight);
    if (several) slot = next;
  }
  if (per_weight > 0) add(-1, sorted.count(), sorted.rows, -1);
  if (static_cast<int>(expected.size()) > count) differ("%s: more than %d pieces", name, count);
  expected.resize(static_cast<size_t>(count), {0, 0, 0, -1});
  for (int i = 0; i < count; ++i)
    if (std::memcmp(got + i, &expected[i], sizeof *got) != 0)
      differ("%s[%d]: expected expert %d from %d on, %d rows, slot %d, but got %d, %d, %d, %d",
             name, i, expected[i].adapter, expected[i].begin, expected[i].count, expected[i].slot,
             got[i].adapter, got[i].begin, got[i].count, got[i].slot);
}

template <class T>
void check_routes(const Sorted& sorted) {
  const auto rows = static_cast<size_t>(sorted.rows), experts = static_cast<size_t>(sorted.experts);
  const GlobalBuffer<int64_t> longs(sorted.chosen, "index");
  const GlobalBuffer<int> ints({sorted.chosen.begin(), sorted.chosen.end()}, "index in int32");
  GlobalBuffer<int> perm(rows, "perm"), token(rows, "token"), place(rows, "place"),
      offs(experts, "offs"), counts((experts + 1) * blocks_of(sorted.rows, 256), "counts");
  ExpertsRoutesParams p{};
  p.is_long = sorted.is_long;
  p.index = p.is_long ? static_cast<const void*>(longs.data()) : ints.data();
  p.perm = perm.data(), p.token = token.data(), p.place = place.data(), p.offs = offs.data();
  p.counts = counts.data();
  p.rows = sorted.rows, p.slots = sorted.slots, p.experts = sorted.experts;
  p.adapters = 1 + sorted.experts % 3;
  const auto made = lora_ext::plan::experts_tables(p.rows, p.experts);
  GlobalBuffer<unsigned char> bytes(static_cast<size_t>(made.bytes), "tables");
  const LoraGroupedTables tables = p.tables = tables_at(made.tables, bytes.data());
  launch<T>(p);
  compare_pieces("tiles", tables.tiles, tables.tile_count, sorted, 64, 0, false);
  compare_pieces("row tiles", tables.row_tiles, tables.row_tile_count, sorted, 128, p.adapters,
                 false);
  compare_pieces("pieces", tables.pieces, tables.piece_count, sorted, tables.piece_rows, 0, true);
  for (int e = 0; e < p.experts; ++e)
    if (tables.ranks[e] != 512) differ("ranks[%d]: %d", e, tables.ranks[e]);
  compare_table("perm", perm, sorted.perm), compare_table("place", place, sorted.place);
  compare_table("offs", offs, sorted.offs);
  std::vector<int> tokens = sorted.perm;
  for (int& each : tokens) each /= sorted.slots;
  compare_table("token", token, tokens);
}

// Of any magnitude, behind an element where it is not aligned.
template <class T>
struct Factor {
  const size_t offset;
  FloatOrHalf<T> numbers;

  Factor(size_t size, bool aligned, Random& random, const char* name)
      : offset(aligned ? 0 : 1), numbers(offset + size, random() % 2, name) {
    numbers.floats.fill(NAN), numbers.halves.fill(from_double<T>(NAN));
    std::uniform_real_distribution<double> real(-1, 1);
    const auto any = [&] { return std::ldexp(real(random), -static_cast<int>(random() % 21)); };
    for (float& number : numbers.floats) number = static_cast<float>(any());
    for (T& number : numbers.halves) number = from_double<T>(any());
  }
  const void* data() {
    return static_cast<const char*>(numbers.data()) +
           offset * (numbers.in_float ? sizeof(float) : sizeof(T));
  }
  double operator[](size_t at) const { return numbers[offset + at]; }
};

// S and T of few rows, and what the kernel leaves as it is.
template <class T, Alignment kAlignment>
struct FewRows {
  const Sorted& sorted;
  const int in, columns, pitch;
  const bool gathered;
  const Operand<T, kAlignment> x;
  GlobalBuffer<int> x_rows{sorted.perm, "x_rows"};
  GlobalBuffer<float> s{static_cast<size_t>(sorted.rows) * pitch, "s"};
  GlobalBuffer<T> t{static_cast<size_t>(sorted.rows) * columns, "t"};

  FewRows(const Sorted& sorted_, int in_, int columns_, int pitch_, Random& random)
      : sorted(sorted_),
        in(in_),
        columns(columns_),
        pitch(pitch_),
        gathered(random() % 2),
        x(gathered ? sorted.tokens : sorted.rows, in, Numbers::Reals, random, "x") {
    for (int& row : x_rows) row /= sorted.slots;
    emulator::race_host_write(x_rows.data(), x_rows.size() * sizeof(int));
    s.fill(kUnwritten), t.fill(from_double<T>(kUnwritten));
  }
  void set(ExpertsFactorsParams& p) {
    p.x = x.data(), p.x_pitch = x.pitch(), p.x_rows = gathered ? x_rows.data() : nullptr;
    p.s = s.data(), p.t = t.data(), p.rows = sorted.rows, p.s_pitch = pitch, p.t_scale = 0.7f;
  }
  void check(const ExpertsFactorsParams& p, const Factor<T>& a) const {
    for (int i = 0; i < sorted.rows; ++i) {
      const int64_t expert = sorted.expert[sorted.perm[i]];
      for (int column = 0; column < pitch; ++column) {
        const int rank = column - p.first;
        const float got = s[static_cast<size_t>(i) * pitch + column];
        const T* of_t = &t[static_cast<size_t>(i) * columns + column];
        if (expert == p.experts || rank < 0 || rank >= p.rank) {
          compare("s", i, column, got, kUnwritten, 0);
          compare("t", i, column, *of_t, to_double(from_double<T>(kUnwritten)), 0);
          continue;
        }
        Bounded sum;
        for (int c = 0; c < in; ++c)
          sum.add(x.matrix(gathered ? x_rows[i] : i, c) * a[(expert * p.rank + rank) * in + c]);
        compare_rounded("s", i, column, got, sum, false);
        compare_halves("t", i, column, *of_t, of_t[(p.terms - 1) * p.width], p.terms == 2,
                       p.t_scale * got, 0);
      }
    }
  }
};

template <class T, Alignment kAlignment>
void check_factors(const Sorted& sorted, int most_columns, Random& random) {
  const bool aligned = random() % 2, all = random() % 2;
  ExpertsFactorsParams p{};
  p.groups = sorted.experts % 2 == 0 ? draw(random, 1, 2) : 1;
  p.group = draw(random, 0, p.groups - 1);
  p.experts = sorted.experts / p.groups, p.rank = draw(random, 1, 20),
  p.out = draw_width(random, 60);
  p.in = aligned ? padded(draw(random, 1, most_columns)) : draw_width(random, most_columns);
  p.terms = draw(random, 1, 2), p.first = aligned ? 8 * draw(random, 0, 2) : draw(random, 0, 9);
  p.ranks = std::max(p.rank, draw_width(random, p.rank + 8));
  p.width = padded(p.first + p.ranks) + 8 * draw(random, 0, 1);
  p.scale = random() % 2 ? 1.f : 1.7f;
  const auto size = [](int a, int b, int c) { return static_cast<size_t>(a) * b * c; };
  Factor<T> a(size(p.experts, p.rank, p.in), aligned, random, "lora_a");
  Factor<T> b(size(p.out, p.rank, p.experts), aligned, random, "lora_b");
  const int columns = p.terms * p.width;
  GlobalBuffer<T> pool_a(size(sorted.experts, columns, p.in), "pool of lora_a"),
      pool_b(size(sorted.experts, p.out, columns), "pool of lora_b");
  pool_a.fill(from_double<T>(kUnwritten)), pool_b.fill(from_double<T>(kUnwritten));
  const GlobalBuffer<int> offs(sorted.offs, "offs");
  p.lora_a = a.data(), p.a_in_float = a.numbers.in_float;
  p.lora_b = b.data(), p.b_in_float = b.numbers.in_float;
  p.pool_a = pool_a.data(), p.pool_b = pool_b.data(), p.offs = all ? nullptr : offs.data();
  FewRows<T, kAlignment> few(sorted, p.in, columns, p.first + p.ranks, random);
  const bool of_few = !all && p.groups == 1 && random() % 2;
  if (of_few) few.set(p);
  launch<T>(p);
  if (of_few) few.check(p, a);

  // Compares a number of a pool, at a rank of the pool.
  const auto check = [&](const char* name, const GlobalBuffer<T>& pool, size_t at, size_t step,
                         int expert, int rank, double number) {
    const bool has_rows =
        (of_few && &pool == &pool_a) || expert % p.groups != p.group
            ? false
            : all || sorted.offs[expert] > (expert == 0 ? 0 : sorted.offs[expert - 1]);
    const T hi = pool[at], lo = pool[at + (p.terms - 1) * step];
    if (has_rows && rank >= p.first && rank < p.first + p.ranks)
      return compare_halves(name, expert, rank, hi, lo, p.terms == 2,
                            rank - p.first < p.rank ? number : 0, 0);
    compare(name, expert, rank, hi, to_double(from_double<T>(kUnwritten)), 0);
    compare(name, expert, rank, lo, to_double(from_double<T>(kUnwritten)), 0);
  };
  for (int g = 0; g < sorted.experts; ++g) {
    const int e = g / p.groups;
    for (int rank = 0; rank < p.width; ++rank) {
      const int j = std::clamp(rank - p.first, 0, p.rank - 1);
      for (int c = 0; c < p.in; ++c)
        check("pool of lora_a", pool_a, size(g * columns + rank, p.in, 1) + c,
              size(p.width, p.in, 1), g, rank, a[size(e * p.rank + j, p.in, 1) + c]);
      for (int c = 0; c < p.out; ++c)
        check("pool of lora_b", pool_b, size(g * p.out + c, columns, 1) + rank, p.width, g, rank,
              p.scale * b[size(c * p.rank + j, p.experts, 1) + e]);
    }
  }
}

// One for each slot; without an expert NaN, which is not read.
template <class T>
void draw_weights(FloatOrHalf<T>& weights, const Sorted& sorted, Numbers kind, Random& random) {
  const Matrix<float> drawn = random_matrix<float>(1, sorted.rows, sorted.rows, kind, random);
  weights.floats.fill(NAN), weights.halves.fill(from_double<T>(NAN));
  for (int i = 0; i < sorted.rows; ++i) {
    if (sorted.expert[i] == sorted.experts) continue;
    if (weights.in_float) weights.floats[i] = drawn.values[i];
    if (!weights.in_float) weights.halves[i] = from_double<T>(drawn.values[i]);
  }
}

template <class T, Alignment kAlignment>
void check_sum(const Sorted& sorted, int n, Numbers kind, Random& random) {
  Operand<T, kAlignment> rows(sorted.rows, n, kind, random, "rows");
  for (int i = sorted.count(); i < sorted.rows; ++i)  // which nobody needs to have written
    std::fill_n(rows.stored.data() + i * rows.pitch(), n, from_double<T>(NAN));
  const bool weighted = random() % 3 > 0;
  FloatOrHalf<T> weights(static_cast<size_t>(sorted.rows), random() % 2, "weights");
  draw_weights(weights, sorted, kind, random);
  const GlobalBuffer<int> place(sorted.place, "place"), offs(sorted.offs, "offs");
  GlobalBuffer<T> out(static_cast<size_t>(sorted.tokens) * n, "out");
  ExpertsSumParams p{};
  p.rows = rows.data(), p.pitch = rows.pitch(), p.place = place.data();
  p.count = offs.data() + sorted.experts - 1, p.out = out.data();
  p.weights = weighted ? weights.data() : nullptr, p.weights_in_float = weights.in_float;
  p.tokens = sorted.tokens, p.slots = sorted.slots, p.n = n;
  launch<T>(p);
  for (int t = 0; t < sorted.tokens; ++t) {
    for (int c = 0; c < n; ++c) {
      Bounded sum;
      for (int slot = t * sorted.slots; slot < (t + 1) * sorted.slots; ++slot)
        if (const int at = sorted.place[slot]; at < sorted.count())
          sum.add((weighted ? weights[slot] : 1) * rows.matrix(at, c));
      compare_rounded("out", t, c, out[static_cast<size_t>(t) * n + c], sum,
                      kind == Numbers::Integers);
    }
  }
}

template <class T, Alignment kAlignment>
void check_dot(const Sorted& sorted, int n, Numbers kind, Random& random) {
  const bool biased = random() % 2, exact = kind == Numbers::Integers;
  const int bias_n = draw_width(random, n);
  const Operand<T, kAlignment> x(sorted.rows, n, kind, random, "x");
  const Operand<T, kAlignment> dx(sorted.rows, n, kind, random, "dx");
  const Operand<T, kAlignment> grad(sorted.tokens, bias_n, kind, random, "grad");
  const Operand<T, kAlignment> bias(sorted.experts, bias_n, kind, random, "bias");
  FloatOrHalf<T> weights(static_cast<size_t>(sorted.rows), random() % 2, "weights");
  FloatOrHalf<T> dweights(static_cast<size_t>(sorted.rows), weights.in_float, "dweights");
  draw_weights(weights, sorted, kind, random);
  const GlobalBuffer<int> perm(sorted.perm, "perm"), offs(sorted.offs, "offs");
  ExpertsDotParams p{};
  p.x = x.data(), p.x_pitch = x.pitch(), p.dx = dx.stored.data(), p.dx_pitch = dx.pitch();
  p.perm = perm.data(), p.offs = offs.data();
  p.weights = weights.data(), p.dweights = dweights.data(), p.weights_in_float = weights.in_float;
  if (biased) p.grad = grad.data(), p.bias = bias.data();
  p.grad_pitch = grad.pitch(), p.bias_pitch = bias.pitch();
  p.rows = sorted.rows, p.slots = sorted.slots, p.experts = sorted.experts, p.n = n;
  p.bias_n = bias_n;
  launch<T>(p);
  for (int i = 0; i < sorted.rows; ++i) {
    const int slot = sorted.perm[i], expert = sorted.expert[slot];
    const bool has_expert = expert < sorted.experts;
    Bounded sum;
    for (int c = 0; has_expert && c < n; ++c) sum.add(x.matrix(i, c) * dx.matrix(i, c));
    for (int c = 0; has_expert && biased && c < bias_n; ++c)
      sum.add(grad.matrix(slot / sorted.slots, c) * bias.matrix(expert, c));
    if (weights.in_float) compare_rounded("dweights", slot, 0, dweights.floats[slot], sum, exact);
    if (!weights.in_float) compare_rounded("dweights", slot, 0, dweights.halves[slot], sum, exact);
    for (int c = 0; c < n; ++c) {
      Bounded scaled;
      scaled.add((has_expert ? weights[slot] : 1) * dx.matrix(i, c));
      compare_rounded("dx", i, c, dx.stored(i, c), scaled, exact);
    }
    for (int c = n; c < dx.stored.width(); ++c)
      if (!std::isnan(to_double(dx.stored(i, c)))) differ("dx[%d, %d] was written", i, c);
  }
}

template <class T>
void run_experts(const Case& run) {
  limit_residency();
  Random random(run.seed);
  const Sorted sorted(run.size, random);
  check_routes<T>(sorted);
  if (run.size.k == 0) return;
  const Numbers kind = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int n = random() % 3 ? draw_width(random, run.size.k) : run.size.k;
  with_alignment(random() % 2, [&](auto alignment) {
    check_factors<T, alignment()>(sorted, run.size.k, random);
    check_sum<T, alignment()>(sorted, n, kind, random);
    check_dot<T, alignment()>(sorted, n, kind, random);
  });
}

}  // namespace

// Most tokens, experts and columns. Without columns the order of the rows alone: of loops that nvcc
// unrolls it needs many rounds, of an expert's pieces and of empty ones.
#ifdef EVERY_INSTANCE
#define SIZES_OF_ROUNDS {"one_chunk_of_one", 32, 1, 0}, {"one", 128, 1, 0}, {"many", 128, 1100, 0},
#else
#define SIZES_OF_ROUNDS
#endif
#define VARIANT(name, ...) {#name, run_experts<__VA_ARGS__>},
const Program program{
    "lora_experts",
    {LORA_EXPERTS_VARIANTS(VARIANT)},
    {SIZES_OF_ROUNDS{"one_chunk", 32, 9, 300}, {"chunks", 90, 40, 40}, {"wide", 2, 3, 2100}}};

}  // namespace kernels
