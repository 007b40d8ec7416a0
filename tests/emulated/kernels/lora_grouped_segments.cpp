// Runs the kernels that find out which rows are whose, on any index, ranges and ranks, in a pool or
// in a list, and compares all of their tables.
#include "emulated/kernels/lora_grouped_segments.h"

#include "emulated/kernels/grouped_rows.h"
#include "emulated/kernels/variants.h"
#include "emulator/emulator.h"

namespace lora_ext::kernel {

LORA_GROUPED_SEGMENTS_INSTANCES(extern template);

namespace {

using emulator::GlobalBuffer;
using kernels::Case;
using kernels::GroupedRows;
using kernels::GroupedTables;

template <class V>
std::string compare(const char* name, const GlobalBuffer<V>& got, const GlobalBuffer<V>& expected,
                    size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto* a = reinterpret_cast<const int*>(&got[i]);
    const auto* b = reinterpret_cast<const int*>(&expected[i]);
    for (size_t field = 0; field < sizeof(V) / sizeof(int); ++field)
      if (a[field] != b[field])
        return emulator::format("%s[%zu], field %zu: expected %d, but got %d", name, i, field,
                                b[field], a[field]);
  }
  return "";
}

void write_entries(emulator::Stream& stream, const std::vector<LoraGroupedEntry>& list,
                   LoraGroupedEntry* to) {
  constexpr size_t kMost = LoraGroupedEntriesParams::kMost;
  for (size_t first = 0; first < list.size(); first += kMost) {
    LoraGroupedEntriesParams params{};
    params.to = to + first, params.count = static_cast<int>(std::min(kMost, list.size() - first));
    std::copy_n(list.begin() + first, params.count, params.entries);
    stream.launch({.grid = dim3(1), .block = dim3(kMost)}, lora_grouped_entries<__half>, params);
  }
}

std::string run_segments(const Case& run) {
  const auto [name, m, groups, most_rank] = run.size;
  std::mt19937_64 random(run.seed);
  const GroupedRows rows(m, groups, most_rank, random);
  const int piece_rows = 64 * (1 + static_cast<int>(random() % 4));
  GroupedTables got(rows, piece_rows), expected(rows, piece_rows);
  expected.fill(rows);

  GlobalBuffer<int> ranks(rows.ranks, "ranks");
  std::vector<LoraGroupedEntry> list;
  for (const int rank : rows.ranks) list.push_back({nullptr, nullptr, 0, 0, rank});
  GlobalBuffer<LoraGroupedEntry> entries(list.size(), "entries");
  LoraGroupedSegmentsParams p{rows.parameters(), {}, got.parameters()};
  using Params = LoraGroupedSegmentsParams;
  emulator::Stream stream;
  if (random() % 2) {
    p.factors.entries = entries.data();
    write_entries(stream, list, entries.data());
  } else {
    p.factors.ranks = ranks.data();
  }
  const auto launch = [&](int blocks, void (*kernel)(Params)) {
    stream.launch({.grid = dim3(static_cast<unsigned>(blocks)),
                   .block = dim3(Params::kThreads),
                   .shared_bytes = Params::kSharedBytes},
                  kernel, p);
  };
  const int chunks = static_cast<int>(kernels::blocks_of(m, Params::kChunk));
  if (rows.indexed) launch(chunks, lora_grouped_count<__half>);
  launch(1, lora_grouped_scan<__half>);
  if (rows.indexed) launch(chunks, lora_grouped_place<__half>);
  kernels::run_timed(stream);

  size_t segments = 1;
  while (expected.segments[segments - 1].adapter >= 0) ++segments;
  for (const std::string& difference :
       {compare("order", got.order, expected.order, got.order.size()),
        compare("segments", got.segments, expected.segments, segments),
        compare("first", got.first, expected.first, got.first.size()),
        compare("tiles", got.tiles, expected.tiles, got.tiles.size()),
        compare("pieces", got.pieces, expected.pieces, got.pieces.size())})
    if (!difference.empty()) return difference;
  for (int g = 0; g < groups; ++g) {  // the slot counts where there are slots
    const LoraGroupedSum sum = got.sums[g], wanted = expected.sums[g];
    if (sum.pieces != wanted.pieces || (sum.pieces > 1 && sum.slot != wanted.slot))
      return emulator::format("sums[%d]: expected %d from %d on, but got %d from %d on", g,
                              wanted.pieces, wanted.slot, sum.pieces, sum.slot);
    if (sum.pieces > 1 && sum.slot + sum.pieces > LoraGroupedTables::slots_of(m, piece_rows))
      return emulator::format("sums[%d] has more slots than there are", g);
  }
  return "";
}

const std::vector<kernels::Variant> kVariants = {{"any", run_segments}};

}  // namespace
}  // namespace lora_ext::kernel

int main(int argc, char** argv) {
  return kernels::variants_main(argc, argv, "lora_grouped_segments",
                                {{"few", 700, 5, 64},
                                 {"one_each", 40, 60, 130},
                                 {"many", 1100, 600, 300},
                                 {"batches", 300, 256, 16},
                                 {"one", 515, 1, 8},
                                 {"tiny", 1, 3, 1}},
                                lora_ext::kernel::kVariants);
}
