// Runs the kernels that sort rows by adapter, on any index, ranges and ranks, in a pool or in a
// list, and compares all of their tables.
#include "emulated/kernels/lora_grouped_segments.h"

#include "emulated/kernels/driver.h"
#include "emulated/kernels/grouped_rows.h"

namespace kernels {
namespace {

template <class V>
void compare_table(const char* name, const GlobalBuffer<V>& got, const GlobalBuffer<V>& expected,
                   size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto* a = reinterpret_cast<const int*>(&got[i]);
    const auto* b = reinterpret_cast<const int*>(&expected[i]);
    for (size_t field = 0; field < sizeof(V) / sizeof(int); ++field)
      if (a[field] != b[field])
        differ("%s[%zu], field %zu: expected %d, but got %d", name, i, field, b[field], a[field]);
  }
}

void write_entries(emulator::Stream& stream, const std::vector<LoraGroupedEntry>& list,
                   LoraGroupedEntry* to) {
  constexpr size_t kMax = LoraGroupedEntriesParams::kMax;
  for (size_t first = 0; first < list.size(); first += kMax) {
    LoraGroupedEntriesParams params{};
    params.to = to + first, params.count = static_cast<int>(std::min(kMax, list.size() - first));
    std::copy_n(list.begin() + first, params.count, params.entries);
    stream.launch({.grid = dim3(1), .block = dim3(kMax)}, lora_grouped_entries<__half>, params);
  }
}

template <bool kOwnWeights>
void run_segments(const Case& run) {
  const auto [name, m, groups, max_rank] = run.size;
  Random random(run.seed);
  const bool alike = kOwnWeights || random() % 4 == 0;
  const GroupedRows rows(m, groups, max_rank, random, alike, kOwnWeights);
  const int piece_rows = 64 * (1 + static_cast<int>(random() % 4));
  const int groups_per_weight = 1 + static_cast<int>(random() % 3);
  GroupedTables got(rows, piece_rows), expected(rows, piece_rows, groups_per_weight);
  expected.fill(rows);

  GlobalBuffer<int> ranks(rows.ranks, "ranks");
  std::vector<LoraGroupedEntry> list;
  for (const int rank : rows.ranks) list.push_back({nullptr, nullptr, 0, 0, rank});
  GlobalBuffer<LoraGroupedEntry> entries(list.size(), "entries");
  LoraGroupedSegmentsParams p{rows.parameters(), {}, got.parameters(), groups_per_weight};
  using Params = LoraGroupedSegmentsParams;
  emulator::Stream stream;
  if (!kOwnWeights && random() % 2) {
    p.factors.entries = entries.data();
    write_entries(stream, list, entries.data());
  } else {
    p.tables.ranks = got.ranks.data();
    if (!kOwnWeights && (!alike || random() % 2)) p.factors.ranks = ranks.data();
  }
  const auto launch = [&](int blocks, void (*kernel)(Params)) {
    stream.launch({.grid = dim3(static_cast<unsigned>(blocks)),
                   .block = dim3(Params::kThreads),
                   .shared_bytes = Params::kSharedBytes},
                  kernel, p);
  };
  const int chunks = static_cast<int>(blocks_of(m, Params::kChunk));
  if (rows.indexed) launch(chunks, lora_grouped_count<__half>);
  launch(1, lora_grouped_scan<__half>);
  if (rows.indexed) launch(chunks, lora_grouped_place<__half>);
  run_timed(stream);

  size_t segments = 1;
  while (expected.segments[segments - 1].adapter >= 0) ++segments;
  compare_table("order", got.order, expected.order, got.order.size());
  compare_table("segments", got.segments, expected.segments, segments);
  compare_table("first", got.first, expected.first, got.first.size());
  compare_table("tiles", got.tiles, expected.tiles, got.tiles.size());
  compare_table("row tiles", got.row_tiles, expected.row_tiles, got.row_tiles.size());
  compare_table("pieces", got.pieces, expected.pieces, got.pieces.size());
  for (int g = 0; g < groups; ++g) {  // the slot counts where there are slots
    const LoraGroupedSum sum = got.sums[g], wanted = expected.sums[g];
    if (sum.pieces != wanted.pieces || (sum.pieces > 1 && sum.slot != wanted.slot))
      differ("sums[%d]: expected %d from %d on, but got %d from %d on", g, wanted.pieces,
             wanted.slot, sum.pieces, sum.slot);
    if (p.tables.ranks != nullptr && got.ranks[g] != rows.rank(g))
      differ("ranks[%d]: expected %d, but got %d", g, rows.rank(g), got.ranks[g]);
    if (sum.pieces > 1 && sum.slot + sum.pieces > lora_ext::plan::Tables::slots_of(m, piece_rows))
      differ("sums[%d] has more slots than there are", g);
  }
}

}  // namespace

const Program program{
    "lora_grouped_segments",
    {{"any", run_segments<false>}, {"own_weights", run_segments<true>}},
    {{"few", 700, 5, 64},
     {"one_each", 40, 60, 130},
     {"many", 1100, 600, 300},
     {"batches", 300, 256, 16},
     {"rounds", 4252, 240, 16},  // 4097 counts, of which the scan takes 4096 at once
     {"one", 515, 1, 8},
     {"tiny", 1, 3, 1}}};

}  // namespace kernels
