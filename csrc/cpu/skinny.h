// The skinny passes of a LoRA linear on the CPU: all but the base GEMM.
//
//     shrink   T[m, j]  = scale * sum_c mask(m, c) P[m, c] Q[c, j]   S = drop(X) A^T, dS = dY B
//     expand   Y[m, c] += scale * mask(m, c) sum_j T[m, j] U[j, c]   Y += S B^T, dX += dS A
//     wgrad    G[j, c]  = scale * sum_m T[m, j] mask(m, c) P[m, c]   dA = dS^T drop(X), dB = dY^T S
//
// rows = M, cols = K or N, rank = r. P and Y have the activation dtype and are converted in
// registers; T is float. Q and U are packed once per call from the adapters, whatever their dtype;
// T is packed into what expand and wgrad read, unless they read T itself. Expand and wgrad over the
// same columns share one pass, and with it one mask. The rows of a pass need not be contiguous: a
// RowIndex gives the position of each (many adapters in one batch).
//
// One table of functions per instruction set. Each function is torch-free and single-threaded over
// a range of rows or columns; groups.h cuts a call into ranges for threads. The order of an
// element's sum does not depend on the ranges, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/bounds.h"
#include "common/philox.h"
#include "cpu/dtypes.h"

namespace lora_ext::cpu {

struct Dropout {
  uint64_t seed = 0;
  int64_t row_offset = 0;
  int64_t col_offset = 0;
  uint32_t keep_count = philox::kKeepOne;
  const int64_t* rows = nullptr;  // the mask's row of each row, counted from row_offset on; or null

  bool enabled() const { return keep_count < philox::kKeepOne; }
  int64_t mask_row(int64_t row) const {
    return rows == nullptr ? row_offset + row : rows[row_offset + row];
  }
};

// Positions of the rows of a pass: row m of P and Y, and of the mask, is rows[m]. T has them in the
// order of the pass.
struct RowIndex {
  const int32_t* at = nullptr;  // null: row m is m

  int64_t operator[](int64_t m) const { return at == nullptr ? m : at[m]; }
};

// A mask as dropout_bits draws it, from row 0 of a product or of a pass and its column 0 on.
struct MaskBits {
  uint32_t* words = nullptr;  // null: it is drawn where it is used
  int64_t pitch = 0;

  MaskBits at(int64_t row, int64_t column) const {
    return words == nullptr ? MaskBits{} : MaskBits{words + row * pitch + column / 32, pitch};
  }
};

// A strided view of an adapter: element (j, c) for rank index j and column c.
struct AdapterView {
  const void* data;
  Dtype dtype;
  int64_t rank_pitch;
  int64_t col_pitch;
  int64_t rank;
  int64_t cols;
};

struct ShrinkArgs {
  const void* p;  // [rows, cols], row pitch p_pitch elements
  Dtype dtype;
  int64_t p_pitch;
  int64_t cols;
  int64_t rank;
  const void* q;   // packed by pack_shrink
  bool q_is_half;  // the adapter was bfloat16: one bfloat16 term holds it exactly
  float scale;
  float* t;  // [rows, rank]
  Dropout dropout;
  RowIndex rows{};
  void* work = nullptr;  // its thread's, shrink_bytes from a multiple of 64 on
};

struct ExpandArgs {
  void* y;  // [rows, cols], row pitch y_pitch elements; null: no expand
  Dtype dtype;
  int64_t y_pitch;
  int64_t cols;
  int64_t rank;
  const void* u;   // packed by pack_expand
  bool u_is_half;  // as q_is_half
  float scale;
  const void* t;  // [rows, rank], packed by pack_expand_t if there is one
  Dropout dropout;
  RowIndex rows{};
};

struct WgradArgs {
  const void* p;  // [rows, cols], row pitch p_pitch elements
  Dtype dtype;
  int64_t p_pitch;
  int64_t rows;
  int64_t rank;
  const void* t;  // [rows, rank], packed by pack_wgrad_t if there is one
  float scale;
  void* g;  // element (j, c) at j * g_rank_pitch + c * g_col_pitch
  Dtype g_dtype;
  int64_t g_rank_pitch;
  int64_t g_col_pitch;
  Dropout dropout;
  RowIndex row_index{};
  MaskBits mask{};       // drawn before
  void* work = nullptr;  // its thread's, wgrad_bytes from a multiple of 64 on
};

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

struct Range {
  int64_t begin;
  int64_t end;
};

// A view of some ranks and columns of a factor.
inline AdapterView part_of(AdapterView view, const Range& ranks, const Range& cols) {
  const int64_t first = ranks.begin * view.rank_pitch + cols.begin * view.col_pitch;
  view.data = static_cast<const char*>(view.data) + first * element_size(view.dtype);
  view.rank = ranks.end - ranks.begin, view.cols = cols.end - cols.begin;
  return view;
}

// Layout of T for a pass: rows starting at multiples of row_granule are packed independently.
struct TLayout {
  int64_t row_granule;
  int64_t (*bytes)(int64_t rows, int64_t rank, bool u_is_half);
  void (*pack)(const float* t, int64_t rank, bool u_is_half, Range rows, void* packed);
};

struct SkinnyKernels {
  const char* name;
  int64_t row_granule;  // ranges of rows start at multiples of this
  int64_t col_granule;  // ranges of columns start at multiples of this

  int64_t (*shrink_panel_bytes)(int64_t rank, int64_t cols);
  void (*pack_shrink)(const AdapterView& adapter, void* panel);
  int64_t (*expand_panel_bytes)(int64_t rank, int64_t cols);
  void (*pack_expand)(const AdapterView& adapter, void* panel);
  TLayout expand_t;  // bytes is null if the pass reads T itself
  TLayout wgrad_t;

  // Of memory that both work in: the stack of a thread may be small.
  int64_t (*shrink_bytes)(int64_t rank);
  int64_t (*wgrad_bytes)(int64_t rank);
  void (*shrink)(const ShrinkArgs& args, Range rows);
  void (*expand)(const ExpandArgs& args, Range rows);
  // Columns [cols) of G; if expand.y is not null, also of Y, which shares T and the mask.
  void (*wgrad)(const WgradArgs& args, const ExpandArgs& expand, Range cols);

  // The same products for few rows with a factor in its original layout, which has unit stride along
  // its ranks or columns: q or u and q_is_half or u_is_half of the arguments are not read. Null if
  // there are none.
  void (*shrink_few)(const ShrinkArgs& args, const AdapterView& q, Range rows);
  void (*expand_few)(const ExpandArgs& args, const AdapterView& u, Range rows);

  // Bit c of word c / 32 in row m of `pitch` words is set when (index[rows.begin + m],
  // cols.begin + c) is kept.
  void (*dropout_bits)(const Dropout& dropout, RowIndex index, Range rows, Range cols,
                       uint32_t* bits, int64_t pitch);
};

// The vector code for the passes over X and dX, and over Y and dY, which may have another dtype.
struct Passes {
  const SkinnyKernels *over_x, *over_y;
};

// Null if this build or this processor lacks the instruction set.
const SkinnyKernels* portable_kernels();
const SkinnyKernels* avx2_kernels();
const SkinnyKernels* avx512_kernels();
const SkinnyKernels* amx_kernels();  // bfloat16 activations only

}  // namespace lora_ext::cpu
