// Many adapters in one batch, for the kernels' host programs: the map from rows to adapters, drawn
// with everything that can be wrong with an index, ranges and ranks, and the tables that the device
// must make of it.
#pragma once
#include <algorithm>
#include <climits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "emulator/memory/global_memory.h"
#include "kernels/lora_grouped.h"

namespace kernels {

// The adapter of each row. `adapter_of[row]` is -1 without an adapter.
struct GroupedRows {
  int m, groups, max_rank;
  bool indexed, own_weights;
  std::vector<int> ranks, given, adapter_of;  // ranks as the device has them, then an index or ends
  std::shared_ptr<GlobalBuffer<int>> buffer;

  // `alike`: all adapters have the largest rank. `own_weights`: they are experts, with ends.
  GroupedRows(int m_, int groups_, int max_rank_, Random& random, bool alike = false,
              bool own_weights_ = false)
      : m(m_),
        groups(groups_),
        max_rank(max_rank_),
        indexed(!own_weights_ && random() % 2),
        own_weights(own_weights_),
        adapter_of(m_, -1) {
    const auto draw = [&](int from, int to) {
      return from + static_cast<int>(random() % static_cast<uint64_t>(to - from + 1));
    };
    const bool odd_ranks = random() % 3 == 0;
    for (int g = 0; g < groups; ++g) {
      const int kind = odd_ranks ? draw(0, 5) : 5;
      ranks.push_back(alike       ? max_rank
                      : kind == 0 ? 0
                      : kind == 1 ? -draw(1, 9)
                      : kind == 2 ? max_rank + draw(1, 99)
                                  : draw(1, max_rank));
    }
    indexed ? draw_index(draw) : draw_ends(draw);
    buffer = std::make_shared<GlobalBuffer<int>>(given, indexed ? "index" : "ends");
    for (int& adapter : adapter_of)
      if (adapter >= 0 && rank(adapter) == 0) adapter = -1;
  }

  int rank(int adapter) const { return std::clamp(ranks[adapter], 0, max_rank); }
  int rank_of_row(int row) const { return adapter_of[row] < 0 ? 0 : rank(adapter_of[row]); }
  LoraGroupedRows parameters() const {
    return {indexed ? buffer->data() : nullptr, indexed ? nullptr : buffer->data(), m, groups,
            max_rank};
  }

  // The same rows, and all adapters with a rank.
  GroupedRows with_rank(int rank) const {
    GroupedRows rows = *this;
    rows.max_rank = rank, rows.ranks.assign(ranks.size(), rank);
    return rows;
  }

  // Gives an index's rows the adapters of the rows from the last on, in place on the device.
  void turn_round() {
    if (!indexed) return;
    std::reverse(adapter_of.begin(), adapter_of.end());
    std::reverse(buffer->begin(), buffer->end());
  }

 private:
  // Draws a sorted or mixed index, or one adapter for most rows; some rows without an adapter, and
  // some invalid values.
  template <class Draw>
  void draw_index(const Draw& draw) {
    const int nobody[] = {-1, -1, INT_MIN, groups, INT_MAX};
    const int kind = draw(0, 3), favourite = draw(0, groups - 1);
    const bool with_none = draw(0, 1);
    for (int row = 0; row < m; ++row) {
      const int any = kind == 3 && draw(0, 9) ? favourite : draw(0, groups - 1);
      given.push_back(with_none && draw(0, 5) == 0 ? nobody[draw(0, 4)] : any);
    }
    if (kind == 0) std::sort(given.begin(), given.end());
    for (int row = 0; row < m; ++row)
      if (given[row] >= 0 && given[row] < groups) adapter_of[row] = given[row];
  }
  // Draws ranges: some empty, some rows after the last, ends that descend or are out of range.
  template <class Draw>
  void draw_ends(const Draw& draw) {
    const bool nonsense = draw(0, 3) == 0, to_the_end = draw(0, 1);
    const int unit = draw(0, 1) ? 1 : 128;  // tiles have 64 or 128 rows
    for (int g = 0; g < groups; ++g) given.push_back(draw(0, draw(0, 3) ? m : m / 2) / unit * unit);
    if (!nonsense) std::sort(given.begin(), given.end());
    if (nonsense) given[draw(0, groups - 1)] = draw(0, 1) ? m + draw(1, 1000) : -draw(1, 1000);
    if (to_the_end) given.back() = m;
    int begin = 0;
    for (int g = 0; g < groups; ++g) {
      const int end = std::max(begin, std::clamp(given[g], 0, m));
      std::fill(adapter_of.begin() + begin, adapter_of.begin() + end, g);
      begin = end;
    }
  }
};

// Memory for the tables, of exactly their size.
struct GroupedTables {
  static size_t size(int64_t count) { return static_cast<size_t>(count); }

  const int m, groups, piece_rows, groups_per_weight;
  const bool indexed, own_weights;
  GlobalBuffer<int> order{size(indexed ? m : 0), "order"};
  GlobalBuffer<int> first{size((m + 127) / 128 + 1), "first"};
  GlobalBuffer<int> counts{size(indexed ? (m + 255) / 256 * (groups + 1) : 0), "counts"};
  GlobalBuffer<LoraGroupedSegment> segments{size(groups + 1), "segments"};
  GlobalBuffer<LoraGroupedPiece> tiles{size(lora_ext::plan::Tables::pieces_of(m, groups, 64)),
                                       "tiles"};
  GlobalBuffer<LoraGroupedPiece> row_tiles{
      size(own_weights ? lora_ext::plan::Tables::pieces_of(m, groups, 128) : 0), "row tiles"};
  GlobalBuffer<LoraGroupedPiece> pieces{
      size(lora_ext::plan::Tables::pieces_of(m, groups, piece_rows)), "pieces"};
  GlobalBuffer<LoraGroupedSum> sums{size(groups), "sums"};
  GlobalBuffer<int> ranks{size(groups), "ranks of the tables"};

  GroupedTables(const GroupedRows& rows, int piece_rows_, int groups_per_weight_ = 1)
      : m(rows.m),
        groups(rows.groups),
        piece_rows(piece_rows_),
        groups_per_weight(groups_per_weight_),
        indexed(rows.indexed),
        own_weights(rows.own_weights) {}

  LoraGroupedTables parameters() {
    return {indexed ? order.data() : nullptr,
            segments.data(),
            first.data(),
            tiles.data(),
            own_weights ? row_tiles.data() : nullptr,
            pieces.data(),
            sums.data(),
            indexed ? counts.data() : nullptr,
            nullptr,
            piece_rows,
            static_cast<int>(tiles.size()),
            static_cast<int>(row_tiles.size()),
            static_cast<int>(pieces.size())};
  }

  // Fills the tables as the device must, on the host, by the simplest algorithm.
  void fill(const GroupedRows& rows) {
    order.fill(0), first.fill(0), segments.fill({}), sums.fill({});
    for (auto* empty : {&tiles, &row_tiles, &pieces}) empty->fill({0, 0, 0, -1});
    const auto order_of = positions(rows);
    for (size_t i = 0; i < order.size(); ++i) order[i] = order_of[i];
    int count = 0, tile = 0, row_tile = 0, piece = 0, slot = 0, steps = 0, last = 0;
    const auto add_row_tiles = [&](int g, int begin, int end) {
      for (int i = begin; own_weights && i < end; i += 128)
        row_tiles[row_tile++] = {g, i, std::min(128, end - i), g < 0 ? -1 : g / groups_per_weight};
    };
    for (int g = 0; g < groups; ++g) {
      int begin = m, end = 0;
      for (int i = 0; i < m; ++i)
        if (rows.adapter_of[order_of[i]] == g) begin = std::min(begin, i), end = i + 1;
      const int all = std::max(0, end - begin), parts = (all + piece_rows - 1) / piece_rows;
      sums[g] = {parts, slot};
      if (all == 0) continue;
      segments[count++] = {g, begin, end, rows.rank(g), steps};
      steps += (rows.rank(g) + 63) / 64;
      for (int i = begin; i < end; i += 64) tiles[tile++] = {g, i, std::min(64, end - i), -1};
      add_row_tiles(g, begin, end), last = end;
      for (int i = begin; i < end; i += piece_rows)
        pieces[piece++] = {g, i, std::min(piece_rows, end - i), parts > 1 ? slot++ : -1};
    }
    segments[count] = {-1, INT_MAX, INT_MAX, 0, steps};
    add_row_tiles(-1, last, m);
    for (size_t i = 0; i < first.size(); ++i) {
      int found = 0;
      while (found < count && segments[found].end <= static_cast<int>(i) * 128) ++found;
      first[i] = found;
    }
  }

  // The row at each position.
  static std::vector<int> positions(const GroupedRows& rows) {
    std::vector<int> order;
    for (int row = 0; row < rows.m; ++row) order.push_back(row);
    if (!rows.indexed) return order;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return static_cast<unsigned>(rows.adapter_of[a]) < static_cast<unsigned>(rows.adapter_of[b]);
    });
    return order;
  }
};

// The row at each position in one operand: by the order of the rows, or, with own weights, at the
// position itself or anywhere, in a table that is not read where a position belongs to nobody.
struct GroupedPlaces {
  std::vector<int> row;
  std::unique_ptr<GlobalBuffer<int>> table;

  // `once`: no two positions have the same row.
  GroupedPlaces(const GroupedRows& rows, bool own, bool once, Random& random, const char* name)
      : row(GroupedTables::positions(rows)) {
    const std::vector<int> order = row;
    if (own) std::iota(row.begin(), row.end(), 0);
    const bool tabled = own ? random() % 4 > 0 : rows.indexed;
    if (!tabled) return;
    if (own && once) std::shuffle(row.begin(), row.end(), random);
    if (own && !once)
      for (int& at : row) at = static_cast<int>(random() % static_cast<uint64_t>(rows.m));
    table = std::make_unique<GlobalBuffer<int>>(row, name);
    for (int i = 0; own && i < rows.m; ++i)
      if (rows.adapter_of[order[i]] < 0) (*table)[i] = INT_MIN;
  }
  const int* data() const { return table ? table->data() : nullptr; }
};

}  // namespace kernels
