// Distributes the tiles of Y over threads: a task is a group of panels and a chunk of rows.
//
//     for each block of the depth: pack its panels, then for each 64 rows: multiply, and after the
//     last block add the rest and store
//
// The blocks of the depth depend on the depth alone, and each element is summed by one thread, so
// that results do not depend on the number of threads or of rows.
#include "cpu/fused_gemm.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "common/base_linear.h"
#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kCacheLine = 16;  // floats; convert writes whole vectors
constexpr int64_t kRowsOfTile = 64;
// Deeper rows lie too far apart for the library's 32-bit offsets within a tile.
constexpr int64_t kMaxDepth = 1 << 22;
constexpr int64_t kPanelBytes = 160 << 10;  // at most: a block has up to 640 floats of the depth
constexpr int64_t kPanels = 2;        // of a group, if each uses a tile of P that is converted
constexpr int64_t kChunkRows = 1024;  // for each chunk the panels are packed anew
constexpr int64_t kMinChunkRows = 128;
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Y = P Q and what TileArgs adds; all that the tasks read.
struct Product {
  const FusedGemmKernels& kernels;
  Dtype panel;
  const char* p;
  Dtype p_dtype;
  int64_t p_pitch, rows, depth;
  MatrixView q;
  TileArgs tile;

  bool converts() const { return p_dtype != panel; }
  int64_t block_depth() const {
    const int64_t most = kPanelBytes / (kPanelCols * static_cast<int64_t>(element_size(panel)));
    const int64_t even = divide_up(depth, divide_up(depth, most));
    return std::min(depth, round_up(even, kCacheLine));
  }
  int64_t converted_pitch() const { return round_up(block_depth(), kCacheLine); }
};

struct Tasks {
  int64_t panels;  // of a group
  int64_t chunk_rows;
  int64_t groups, chunks;

  int64_t count() const { return groups * chunks; }
};

// About four tasks for each thread, by shorter chunks and then by smaller groups.
Tasks tasks_of(const Product& product, int64_t threads) {
  const int64_t rows = round_up(product.rows, kRowsOfTile);
  Tasks tasks{product.converts() ? kPanels : 1, std::min(kChunkRows, rows), 0, 0};
  const auto divide = [&] {
    tasks.groups = divide_up(product.tile.cols, tasks.panels * kPanelCols);
    tasks.chunks = divide_up(product.rows, tasks.chunk_rows);
  };
  divide();
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  while (tasks.count() < wanted && tasks.chunk_rows > kMinChunkRows) {
    tasks.chunk_rows = std::max(kMinChunkRows, round_up(tasks.chunk_rows / 2, kRowsOfTile));
    divide();
  }
  if (tasks.count() < wanted) {
    tasks.panels = 1;
    divide();
  }
  return tasks;
}

// The memory of one thread.
struct Buffers {
  char* panels;      // [panels of a group, block_depth, 64]
  float* sums;       // [panels of a group, chunk_rows, 64]; one tile if the depth is one block
  float* converted;  // [64, converted_pitch]

  static int64_t panel_bytes(const Product& product) {
    const int64_t depth = round_up(product.block_depth(), 2);
    return depth * kPanelCols * static_cast<int64_t>(element_size(product.panel));
  }
  static int64_t sums_of(const Product& product, const Tasks& tasks) {
    const bool whole = product.block_depth() >= product.depth;
    return kPanelCols * (whole ? kRowsOfTile : tasks.panels * tasks.chunk_rows);
  }
  static int64_t bytes(const Product& product, const Tasks& tasks) {
    const int64_t converted = product.converts() ? kRowsOfTile * product.converted_pitch() : 0;
    const int64_t floats = sums_of(product, tasks) + converted;
    return tasks.panels * panel_bytes(product) + floats * static_cast<int64_t>(sizeof(float));
  }
  Buffers(const Product& product, const Tasks& tasks, char* memory)
      : panels(memory),
        sums(reinterpret_cast<float*>(memory + tasks.panels * panel_bytes(product))),
        converted(sums + sums_of(product, tasks)) {}
};

// C (+)= A B for up to 64 rows. The library keeps a kernel for each number of rows: these are 7.
void multiply_rows(const Product& product, int64_t rows, int64_t depth, const char* a,
                   int64_t a_pitch, const char* panel, bool add, float* sums) {
  const auto bytes = static_cast<int64_t>(element_size(product.panel));
  int64_t row = 0;
  for (int64_t count = kRowsOfTile; row < rows; count /= 2) {
    for (; rows - row >= count; row += count) {
      multiply_panel(product.panel, count, depth, a + row * a_pitch * bytes, a_pitch, panel, add,
                     sums + row * kPanelCols);
    }
  }
}

class Worker {
 public:
  Worker(const Product& product, const Tasks& tasks, char* memory)
      : product_(product),
        tasks_(tasks),
        buffers_(product, tasks, memory),
        panel_bytes_(Buffers::panel_bytes(product)) {}

  void run(int64_t task) {
    const int64_t group = task / tasks_.chunks, chunk = task % tasks_.chunks;
    const int64_t first = group * tasks_.panels * kPanelCols;
    const Range cols{first, std::min(first + tasks_.panels * kPanelCols, product_.tile.cols)};
    const Range rows{chunk * tasks_.chunk_rows,
                     std::min((chunk + 1) * tasks_.chunk_rows, product_.rows)};
    const int64_t step = product_.block_depth();
    const bool is_packed = step >= product_.depth && group == packed_;
    for (int64_t d = 0; d < product_.depth; d += step) {
      const Range depth{d, std::min(d + step, product_.depth)};
      if (!is_packed) pack(depth, cols);
      for (int64_t row = rows.begin; row < rows.end; row += kRowsOfTile) {
        const Range tile{row, std::min(row + kRowsOfTile, rows.end)};
        multiply(tile, row - rows.begin, depth, cols);
      }
    }
    packed_ = group;
  }

 private:
  char* panel(int64_t index) const { return buffers_.panels + index * panel_bytes_; }

  static Range panel_cols(Range cols, int64_t index) {
    const int64_t first = cols.begin + index * kPanelCols;
    return {first, std::min(first + kPanelCols, cols.end)};
  }

  void pack(Range depth, Range cols) const {
    for (int64_t i = 0; i * kPanelCols < cols.end - cols.begin; ++i) {
      if (product_.panel == Dtype::kBFloat16) {
        product_.kernels.pack_bfloat16(product_.q, depth, panel_cols(cols, i),
                                       reinterpret_cast<BFloat16*>(panel(i)));
      } else {
        product_.kernels.pack_float(product_.q, depth, panel_cols(cols, i),
                                    reinterpret_cast<float*>(panel(i)));
      }
    }
  }

  // The products of a tile's rows with each panel; `row` counts from the chunk's first row.
  void multiply(Range rows, int64_t row, Range depth, Range cols) const {
    const int64_t count = rows.end - rows.begin, length = depth.end - depth.begin;
    const bool is_first = depth.begin == 0, is_last = depth.end == product_.depth;
    const char* a = product_.p + (rows.begin * product_.p_pitch + depth.begin) *
                                     static_cast<int64_t>(element_size(product_.p_dtype));
    int64_t a_pitch = product_.p_pitch;
    if (product_.converts()) {
      product_.kernels.convert(a, product_.p_dtype, a_pitch, count, length, buffers_.converted,
                               product_.converted_pitch());
      a = reinterpret_cast<const char*>(buffers_.converted), a_pitch = product_.converted_pitch();
    }
    for (int64_t i = 0; i * kPanelCols < cols.end - cols.begin; ++i) {
      float* sums = buffers_.sums;
      if (!is_first || !is_last) sums += (i * tasks_.chunk_rows + row) * kPanelCols;
      multiply_rows(product_, count, length, a, a_pitch, panel(i), !is_first, sums);
      if (is_last) product_.kernels.store_tile(product_.tile, sums, rows, panel_cols(cols, i));
    }
  }

  const Product& product_;
  const Tasks& tasks_;
  Buffers buffers_;
  int64_t panel_bytes_;
  int64_t packed_ = -1;  // the group whose panels, of the whole depth, are in the buffer
};

void run(const Product& product) {
  const int64_t threads = threads_for(product.rows * product.depth * product.tile.cols);
  const Tasks tasks = tasks_of(product, threads);
  const int64_t used = std::min(threads, tasks.count());
  const int64_t bytes = round_up(Buffers::bytes(product, tasks), 64);
  const at::Tensor memory = at::empty({used * bytes}, at::kByte);
  char* first = static_cast<char*>(memory.mutable_data_ptr());
  at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
    const PanelProducts products(product.panel);
    for (int64_t thread = begin; thread < end; ++thread) {
      Worker worker(product, tasks, first + thread * bytes);
      const int64_t last = (thread + 1) * tasks.count() / used;
      for (int64_t task = thread * tasks.count() / used; task < last; ++task) worker.run(task);
    }
  });
}

// The dtype of the panels if they are the faster way to P Q.
std::optional<Dtype> faster_panel(const at::Tensor& p, const at::Tensor& q) {
  const Dtype dtype = dtype_of(p.scalar_type());
  const std::optional<Dtype> panel = panel_dtype(dtype);
  if (p.size(1) > kMaxDepth) return {};
  const bool is_copied = panel && *panel != dtype && q.stride(1) == 1;
  return is_copied || p.size(0) >= kMinPanelRows ? panel : std::nullopt;
}

// That of the base's product; batch-invariant calls are by panels wherever they can be.
std::optional<Dtype> base_panel(const at::Tensor& p, const Base& base, bool is_forward) {
  if (base.is_given()) return {};
  if (base.row_block > 0 && p.size(1) <= kMaxDepth) {
    return batch_invariant_panel_dtype(dtype_of(p.scalar_type()));
  }
  if (is_forward ? base.packed : base.packed_t) return {};
  return faster_panel(p, is_forward ? base.weight.t() : base.weight);
}

// P in memory as the library takes A. It keeps a kernel for each pitch, so that of a wider matrix,
// as a slice has it, would add one more; and rows may overlap, or lie too far apart.
at::Tensor with_own_pitch(const at::Tensor& p) {
  return p.stride(0) == p.size(1) ? p : p.clone(at::MemoryFormat::Contiguous);
}

// All of one dtype; P and out have last stride 1.
void fused_product(const at::Tensor& any_p, const at::Tensor& q,
                   const std::optional<at::Tensor>& bias, const LowRank* low_rank, Dtype panel,
                   const at::Tensor& out) {
  const FusedGemmKernels& kernels = *fused_gemm_kernels();
  const Dtype dtype = dtype_of(any_p.scalar_type());
  const at::Tensor p = panel == dtype ? with_own_pitch(any_p) : any_p;
  at::Tensor u, bias_row;
  TileArgs tile{};
  tile.y = out.mutable_data_ptr(), tile.dtype = dtype;
  tile.y_pitch = out.stride(0), tile.cols = out.size(1);
  if (bias) {
    bias_row = bias->contiguous();
    tile.bias = bias_row.const_data_ptr();
  }
  if (low_rank != nullptr) {
    u = at::empty({kernels.skinny->expand_panel_bytes(low_rank->u.rank, low_rank->u.cols)},
                  at::kByte);
    kernels.skinny->pack_expand(low_rank->u, u.mutable_data_ptr());
    tile.t = low_rank->t.const_data_ptr<float>(), tile.rank = low_rank->u.rank;
    tile.u = u.const_data_ptr(), tile.scale = static_cast<float>(low_rank->scale);
    tile.dropout = low_rank->dropout;
  }
  run({kernels, panel, static_cast<const char*>(p.const_data_ptr()), dtype, p.stride(0), p.size(0),
       p.size(1), MatrixView{q.const_data_ptr(), dtype, q.stride(0), q.stride(1)}, tile});
}

}  // namespace

std::optional<Dtype> fused_panel(const at::Tensor& p, const Base& base, bool is_forward) {
  return p.size(0) >= kMinPanelRows || base.row_block > 0 ? base_panel(p, base, is_forward)
                                                          : std::nullopt;
}

at::Tensor fused_forward(const at::Tensor& x, const Base& base, Dtype panel,
                         const LowRank* low_rank) {
  const at::Tensor y = at::empty({x.size(0), base.weight.size(0)}, x.options());
  fused_product(x, base.weight.t(), base.bias, low_rank, panel, y);
  return y;
}

at::Tensor fused_backward(const at::Tensor& grad, const Base& base, Dtype panel,
                          const LowRank* low_rank) {
  const at::Tensor dx = at::empty({grad.size(0), base.weight.size(1)}, grad.options());
  fused_product(grad, base.weight, std::nullopt, low_rank, panel, dx);
  return dx;
}

at::Tensor forward_of_base(const at::Tensor& x, const Base& base) {
  const std::optional<Dtype> panel = base_panel(x, base, true);
  return panel ? fused_forward(x, base, *panel, nullptr) : base_forward(x, base);
}

at::Tensor backward_of_base(const at::Tensor& grad, const at::Tensor& x, const Base& base) {
  const std::optional<Dtype> panel = base_panel(grad, base, false);
  return panel ? fused_backward(grad, base, *panel, nullptr) : base_backward(grad, x, base);
}

void product(const at::Tensor& p, const at::Tensor& q, const std::optional<at::Tensor>& bias,
             at::Tensor& out) {
  // Whether a pointer says all of a tensor: what torch's dispatcher resolves goes to torch.
  const auto is_plain = [&](const at::Tensor& t) {
    const c10::DispatchKeySet keys = t.key_set();
    return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == p.scalar_type() &&
           !keys.has_any(
               c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                    c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor})) &&
           !(at::GradMode::is_enabled() && t.requires_grad());
  };
  const bool has_panels = p.scalar_type() == at::kFloat || is_half(p.scalar_type());
  const bool fits = has_panels && p.dim() == 2 && q.dim() == 2 && p.size(1) == q.size(0) &&
                    out.sizes() == at::IntArrayRef{p.size(0), q.size(1)} &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == q.size(1) && is_plain(*bias)));
  const bool by_pointers = fits && is_plain(p) && is_plain(q) && is_plain(out) && p.numel() != 0 &&
                           out.numel() != 0 && p.stride(1) == 1 && out.stride(1) == 1 &&
                           out.stride(0) >= out.size(1);
  if (const auto panel = by_pointers ? faster_panel(p, q) : std::nullopt) {
    fused_product(p, q, bias, nullptr, *panel, out);
    out.unsafeGetTensorImpl()->bump_version();
  } else if (bias) {
    at::addmm_out(out, *bias, p, q);
  } else {
    at::mm_out(out, p, q);
  }
}

}  // namespace lora_ext::cpu
