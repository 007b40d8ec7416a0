// Distributes the tiles of Y over threads: a task is a group of panels and a chunk of rows.
//
//     for each block of the depth: pack its panels, then for each 64 rows: multiply, and after the
//     last block add the rest and store
//
// The blocks of the depth depend on the depth alone, and each element is summed by one thread, so
// that results do not depend on the number of threads or of rows.
#include "cpu/fused_product.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/brgemm.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kCacheLine = 16;  // floats; convert writes whole vectors
constexpr int64_t kRowsOfTile = 64;
constexpr int64_t kPanelBytes = 160 << 10;  // at most: a block has up to 640 floats of the depth
constexpr int64_t kPanels = 2;              // of a group, if each uses a tile of P that is copied
constexpr int64_t kChunkRows = 1024;        // for each chunk the panels are packed anew
constexpr int64_t kMinChunkRows = 128;
constexpr int64_t kBlockCols = 32;  // a walk's groups have multiples

int64_t count_of(Range range) { return range.end - range.begin; }

// The rows of a tile of P are copied where they are converted or not consecutive.
bool copies(const FusedProduct& product) {
  return product.p_dtype != Dtype::kFloat32 || product.p_rows.at != nullptr;
}

int64_t block_depth(const FusedProduct& product) {
  const int64_t most = kPanelBytes / (kPanelCols * static_cast<int64_t>(sizeof(float)));
  const int64_t even = divide_up(product.depth, divide_up(product.depth, most));
  return std::min(product.depth, round_up(even, kCacheLine));
}

struct Tasks {
  int64_t width = kPanelCols;  // of a group
  int64_t chunk_rows = kRowsOfTile;
  bool are_whole = false;  // each has all rows of its part
  std::vector<ProductTask> each{};
};

// About four tasks for each thread, by shorter chunks and then by smaller groups; the reverse, and
// half as many, where each chunk packs Q anew.
Tasks tasks_of(const FusedProduct& product, int64_t threads) {
  int64_t most_rows = 0;
  for (const BasePart& part : product.parts) most_rows = std::max(most_rows, count_of(part.rows));
  const TileWalk* tiles = product.kernels.walk_of(product.panel);
  const int64_t block = tiles == nullptr ? kRowsOfTile : tiles->block_rows;
  const int64_t least_rows = round_up(kMinChunkRows, block);
  Tasks tasks{copies(product) ? kPanels * kPanelCols : kPanelCols,
              round_up(std::min(kChunkRows, most_rows), block)};
  int64_t least_width = kPanelCols;
  if (tiles != nullptr) {
    const int64_t most = tiles->cols(product.depth, most_rows);
    tasks.width = round_up(divide_up(product.cols, divide_up(product.cols, most)), kBlockCols);
    least_width = std::min(tasks.width, tiles->least_cols);
  }
  const auto count = [&] {
    int64_t chunks = 0;
    for (const BasePart& part : product.parts) {
      chunks += divide_up(count_of(part.rows), tasks.chunk_rows);
    }
    return chunks * divide_up(product.cols, tasks.width);
  };
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const bool is_deep = tiles != nullptr && product.depth > tiles->whole_depth;
  if (is_deep && count() < wanted) tasks.width = least_width;
  while (count() < (is_deep ? wanted / 2 : wanted) && tasks.chunk_rows > least_rows) {
    tasks.chunk_rows = round_up(std::max(least_rows, tasks.chunk_rows / 2), block);
  }
  if (count() < wanted) tasks.width = least_width;
  const int64_t width = tasks.width;
  tasks.are_whole = tasks.chunk_rows >= most_rows;
  for (const BasePart& part : product.parts) {
    for (int64_t col = 0; col < product.cols; col += width) {
      const Range cols{col, std::min(col + width, product.cols)};
      for (int64_t row = part.rows.begin; row < part.rows.end; row += tasks.chunk_rows) {
        const Range rows{row, std::min(row + tasks.chunk_rows, part.rows.end)};
        // Packing takes as long as some rows.
        tasks.each.push_back({&part, rows, cols, (count_of(rows) + 8) * count_of(cols)});
      }
    }
  }
  return tasks;
}

// The memory of one thread, in bytes from its start; each is a multiple of 64.
struct Layout {
  int64_t panel;     // [block_depth, 64] of floats, one for each panel of a group
  int64_t update;    // U of an adapter, the columns of a panel; the same
  int64_t sums;      // [panels of a group, chunk_rows, 64]; one tile if the depth is one block
  int64_t copied;    // [64, copied_pitch], or nothing
  int64_t low_rank;  // one tile, or nothing
  int64_t copied_pitch;
  int64_t panels;  // of a group

  Layout(const FusedProduct& product, const Tasks& tasks) {
    constexpr int64_t kTile = kRowsOfTile * kPanelCols * sizeof(float);
    const int64_t depth = block_depth(product);
    int64_t rank = 0;
    for (const RowUpdate& update : product.updates) rank = std::max(rank, update.u.rank);
    const bool is_whole = block_depth(product) >= product.depth;
    panels = tasks.width / kPanelCols;
    panel = depth * kPanelCols * static_cast<int64_t>(sizeof(float));
    update = round_up(product.kernels.skinny->expand_panel_bytes(rank, kPanelCols), 64);
    sums = is_whole ? kTile : kTile / kRowsOfTile * panels * tasks.chunk_rows;
    copied_pitch = round_up(depth, kCacheLine);
    copied = copies(product) ? kRowsOfTile * copied_pitch * static_cast<int64_t>(sizeof(float)) : 0;
    low_rank = product.updates.empty() ? 0 : kTile;
  }
  int64_t bytes() const { return panels * (panel + update) + sums + copied + low_rank; }
};

// C (+)= A B for up to 64 rows. The library keeps a kernel for each number of rows: these are 7.
void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t a_pitch, const float* panel,
                   bool add, float* sums) {
  int64_t row = 0;
  for (int64_t count = kRowsOfTile; row < rows; count /= 2) {
    for (; rows - row >= count; row += count) {
      multiply_panel(count, depth, a + row * a_pitch, a_pitch, panel, add, sums + row * kPanelCols);
    }
  }
}

class Worker {
 public:
  Worker(const FusedProduct& product, const Tasks& tasks, const Layout& layout, char* memory)
      : product_(product),
        layout_(layout),
        chunk_rows_(tasks.chunk_rows),
        block_depth_(block_depth(product)),
        panels_(memory),
        updates_(panels_ + layout.panels * layout.panel),
        sums_(reinterpret_cast<float*>(updates_ + layout.panels * layout.update)),
        copied_(reinterpret_cast<float*>(reinterpret_cast<char*>(sums_) + layout.sums)),
        low_rank_(reinterpret_cast<float*>(reinterpret_cast<char*>(copied_) + layout.copied)) {}

  void run(const ProductTask& task) {
    const std::pair<const BasePart*, int64_t> group{task.part, task.cols.begin};
    const bool is_packed = block_depth_ >= product_.depth && group == packed_;
    for (int64_t d = 0; d < product_.depth; d += block_depth_) {
      const Range depth{d, std::min(d + block_depth_, product_.depth)};
      if (!is_packed) pack(*task.part, depth, task.cols);
      for (int64_t row = task.rows.begin; row < task.rows.end; row += kRowsOfTile) {
        const Range tile{row, std::min(row + kRowsOfTile, task.rows.end)};
        multiply(task, tile, depth);
      }
    }
    packed_ = group;
  }

 private:
  float* panel(int64_t index) const {
    return reinterpret_cast<float*>(panels_ + index * layout_.panel);
  }

  static Range panel_cols(Range cols, int64_t index) {
    const int64_t first = cols.begin + index * kPanelCols;
    return {first, std::min(first + kPanelCols, cols.end)};
  }

  void pack(const BasePart& part, Range depth, Range cols) const {
    MatrixView q = product_.q;
    q.data = part.q;
    for (int64_t i = 0; i * kPanelCols < count_of(cols); ++i) {
      product_.kernels.pack_float(q, depth, panel_cols(cols, i), panel(i));
    }
  }

  // The products of a tile's rows with each panel of the task.
  void multiply(const ProductTask& task, Range rows, Range depth) {
    const bool is_first = depth.begin == 0, is_last = depth.end == product_.depth;
    int64_t a_pitch = product_.p_pitch;
    const float* a = rows_of_p(rows, depth, a_pitch);
    for (int64_t i = 0; i * kPanelCols < count_of(task.cols); ++i) {
      const Range cols = panel_cols(task.cols, i);
      float* sums = sums_;
      if (!is_first || !is_last) {
        sums += (i * chunk_rows_ + rows.begin - task.rows.begin) * kPanelCols;
      }
      multiply_rows(count_of(rows), count_of(depth), a, a_pitch, panel(i), !is_first, sums);
      if (!is_last) continue;
      TileArgs tile = product_.tile;
      tile.bias = task.part->bias;
      tile.low_rank = low_rank_of(rows, cols, i);
      product_.kernels.store_tile(tile, sums, rows, cols);
    }
  }

  // Rows of P as floats; a_pitch is set if they are a copy.
  const float* rows_of_p(Range rows, Range depth, int64_t& a_pitch) const {
    if (!copies(product_)) {
      return static_cast<const float*>(product_.p) + rows.begin * a_pitch + depth.begin;
    }
    const int64_t skipped = depth.begin * static_cast<int64_t>(element_size(product_.p_dtype));
    a_pitch = layout_.copied_pitch;
    product_.kernels.convert(static_cast<const char*>(product_.p) + skipped, product_.p_dtype,
                             product_.p_pitch, product_.p_rows, rows, count_of(depth), copied_,
                             a_pitch);
    return copied_;
  }

  // The low-rank part of a tile in the i-th panel of the group, or null: no row has an adapter.
  const float* low_rank_of(Range rows, Range cols, int64_t i) {
    auto update = std::partition_point(
        product_.updates.begin(), product_.updates.end(),
        [&](const RowUpdate& before) { return before.rows.end <= rows.begin; });
    const auto is_within = [&] {
      return update != product_.updates.end() && update->rows.begin < rows.end;
    };
    if (!is_within()) return nullptr;
    const auto at = [&](int64_t row) { return low_rank_ + (row - rows.begin) * kPanelCols; };
    int64_t row = rows.begin;
    for (; is_within(); ++update) {
      const Range own{std::max(update->rows.begin, row), std::min(update->rows.end, rows.end)};
      std::fill(at(row), at(own.begin), 0.0f);
      product_.kernels.low_rank_tile(*update, own.begin, count_of(own), count_of(cols),
                                     packed_update(*update, cols, i), at(own.begin));
      row = own.end;
    }
    std::fill(at(row), at(rows.end), 0.0f);
    return low_rank_;
  }

  // U's columns of a panel, packed once for consecutive tiles with this update.
  const void* packed_update(const RowUpdate& update, Range cols, int64_t i) {
    char* memory = updates_ + i * layout_.update;
    const std::pair<const RowUpdate*, int64_t> wanted{&update, cols.begin};
    if (packed_updates_[i] != wanted) {
      product_.kernels.skinny->pack_expand(part_of(update.u, {0, update.u.rank}, cols), memory);
      packed_updates_[i] = wanted;
    }
    return memory;
  }

  const FusedProduct& product_;
  const Layout& layout_;
  int64_t chunk_rows_, block_depth_;
  char *panels_, *updates_;
  float *sums_, *copied_, *low_rank_;
  // What is in the buffers: the group whose panels, of the whole depth, and for each panel of the
  // group the update; each with its first column.
  std::pair<const BasePart*, int64_t> packed_{};
  std::pair<const RowUpdate*, int64_t> packed_updates_[kPanels] = {};
};

// Runs tasks on threads, each with its memory.
void run_shares(const std::vector<ProductTask>& tasks, int64_t threads, int64_t bytes, char* memory,
                const std::function<void(const WalkShare&)>& run) {
  const std::vector<size_t> firsts = shares_of(tasks, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const ProductTask* own = tasks.data() + firsts[static_cast<size_t>(thread)];
      run({own, tasks.data() + firsts[static_cast<size_t>(thread) + 1], memory + thread * bytes});
    }
  });
}

void walk_panels(const FusedProduct& product, const Tasks& tasks, int64_t threads) {
  const Layout layout(product, tasks);
  const at::Tensor memory = at::empty({threads * layout.bytes()}, at::kByte);
  run_shares(tasks.each, threads, layout.bytes(), static_cast<char*>(memory.mutable_data_ptr()),
             [&](const WalkShare& share) {
               Worker worker(product, tasks, layout, share.memory);
               for (const ProductTask* task = share.begin; task != share.end; ++task) {
                 worker.run(*task);
               }
             });
}

// The rows of all parts, for a walk that makes T of them.
std::vector<ProductTask> rows_of_all(const FusedProduct& product, int64_t block) {
  std::vector<ProductTask> found;
  for (const BasePart& part : product.parts) {
    for (int64_t row = part.rows.begin; row < part.rows.end; row += block) {
      const Range rows{row, std::min(row + block, part.rows.end)};
      found.push_back({&part, rows, {}, count_of(rows)});
    }
  }
  return found;
}

void walk_tiles(const FusedProduct& product, const TileWalk& walk, const Tasks& tasks,
                int64_t threads) {
  const WalkTasks all{tasks.chunk_rows, tasks.width, tasks.are_whole};
  const int64_t bytes = walk.bytes(product, all);
  const at::Tensor memory = at::empty({threads * bytes}, at::kByte);
  char* first = static_cast<char*>(memory.mutable_data_ptr());
  if (product.makes_t && walk.make_t != nullptr) {
    run_shares(rows_of_all(product, walk.block_rows), threads, bytes, first,
               [&](const WalkShare& share) { walk.make_t(product, share); });
  }
  run_shares(tasks.each, threads, bytes, first,
             [&](const WalkShare& share) { walk.run(product, all, share); });
}

}  // namespace

void multiply(const FusedProduct& product) {
  int64_t rows = 0;
  for (const BasePart& part : product.parts) rows += count_of(part.rows);
  const int64_t threads = threads_for(rows * product.depth * product.cols);
  const Tasks tasks = tasks_of(product, threads);
  const int64_t used = std::min(threads, static_cast<int64_t>(tasks.each.size()));
  if (used == 0) return;
  const TileWalk* walk = product.kernels.walk_of(product.panel);
  walk == nullptr ? walk_panels(product, tasks, used) : walk_tiles(product, *walk, tasks, used);
}

}  // namespace lora_ext::cpu
