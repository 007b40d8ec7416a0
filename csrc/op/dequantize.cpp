// lora_ext::dequantize writes a frozen weight as floating values into a tensor of the caller's.
// kFormats lists the formats: for each, its check and its kernels on the CPU and on CUDA.
#include "kernels/dequantize.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "common/check.h"
#include "cpu/dispatch.h"
#include "kernels/device.h"
#include "op/launch/launch_parts.h"

namespace lora_ext::quantized {
namespace {

constexpr char op[] = "dequantize";      // in messages
constexpr int64_t kGrain = 1 << 15;      // values worth a thread's start, about 5 us
constexpr int64_t kCodesOfFourBits = 2;  // in a byte
constexpr int64_t kScales = 512;         // that are read at a time

// Scales that are 8-bit codes themselves, as cpu::NestedScales.
struct NestedScale {
  std::optional<at::Tensor> table{};   // [256]
  std::optional<at::Tensor> scale{};   // one for each block of codes
  std::optional<at::Tensor> offset{};  // one element
  int64_t block = 1;

  void read(const at::Tensor& codes, cpu::Range range, float* out) const {
    const cpu::NestedScales scales{codes.const_data_ptr<uint8_t>(), table->const_data_ptr<float>(),
                                   scale->const_data_ptr<float>(), *offset->const_data_ptr<float>(),
                                   block};
    scales.read(range, out);
  }
};

// The matrices of a mixture's experts, one after the other in out.
struct Experts {
  const std::optional<at::Tensor>& offs;  // int32, the ends of all experts' rows; none: one matrix
  int64_t first, count;                   // the expert of the first matrix, and the matrices of out

  void check(const at::Tensor& out) const;
};

// What a format does not have is not read.
struct Quantized {
  const at::Tensor &codes, &scale;
  const std::optional<at::Tensor>& table;  // [16], float
  bool low_first;                          // of two codes of a byte, which is the first
  int64_t block, block_rows;               // codes of a row that share a scale, and rows
  NestedScale nested;
  double multiplier;  // of every scale
  Experts experts;

  bool is_float8() const { return codes.scalar_type() == at::kFloat8_e4m3fn; }
};

// ---- checks ----

// Tensors on different devices are dispatched to the kernel of one of the devices; with a meta
// tensor among them that kernel would write nothing.
void check(const char* name, const at::Tensor& tensor, const at::Tensor& out, at::ScalarType dtype,
           const c10::SymInt& count) {
  EXPECT(tensor.device() == out.device(), "expected ", name, " on out's device, ", out.device(),
         ", but got it on ", tensor.device());
  EXPECT_TYPE(tensor.scalar_type() == dtype, "expected ", name, " in ", dtype, ", but got ",
              tensor.scalar_type());
  EXPECT(tensor.is_contiguous(), "expected a contiguous ", name, ", but got strides ",
         tensor.strides());
  EXPECT(tensor.sym_numel() == count, "expected ", name, " of ", count, " elements, but got ",
         tensor.sym_numel());
}

void Experts::check(const at::Tensor& out) const {
  EXPECT(count > 0 && out.sym_size(0) % count == 0, "expected out of ", count,
         " matrices of whole rows, but got shape ", out.sym_sizes());
  if (!offs) return;
  quantized::check("offs", *offs, out, at::kInt, offs->sym_numel());
  EXPECT(first >= 0 && first + count <= offs->sym_numel(),
         "expected out of whole matrices of experts that offs has, but got ", count, " from ",
         first, " on for out of shape ", out.sym_sizes(), " and offs of ", offs->sym_sizes());
}

void check_table(const Quantized& weight, const at::Tensor& out) {
  EXPECT(weight.table.has_value(), "expected a table of 16 elements, but got none");
  check("table", *weight.table, out, at::kFloat, 16);
}

c10::SymInt blocks_of(const c10::SymInt& count, int64_t block) {
  EXPECT(block >= 2 && block % 2 == 0, "expected an even block, but got ", block);
  return count / block + (count % block != 0 ? 1 : 0);
}

void check_4bit(const Quantized& weight, const at::Tensor& out) {
  const NestedScale& nested = weight.nested;
  const c10::SymInt count = out.sym_numel(), blocks = blocks_of(count, weight.block);
  check("codes", weight.codes, out, at::kByte, (count + 1) / kCodesOfFourBits);
  check_table(weight, out);
  check("scale", weight.scale, out, nested.table ? at::kByte : at::kFloat, blocks);
  EXPECT(nested.table.has_value() == nested.scale.has_value() &&
             nested.table.has_value() == nested.offset.has_value(),
         "expected all of scale_table, scale_scale and scale_offset, or none");
  if (!nested.table) return;
  check("scale_table", *nested.table, out, at::kFloat, 256);
  check("scale_scale", *nested.scale, out, at::kFloat, blocks_of(blocks, nested.block));
  check("scale_offset", *nested.offset, out, at::kFloat, 1);
}

void check_two_dims(const at::Tensor& out) {
  EXPECT(out.dim() == 2, "expected out of 2 dimensions, but got shape ", out.sym_sizes());
}

void check_panels(const Quantized& weight, const at::Tensor& out) {
  constexpr int64_t kRows = cpu::PanelArgs::kRows;
  const int64_t block = weight.block;
  check_two_dims(out);
  EXPECT(block >= 32 && block % 32 == 0, "expected a block that 32 divides, but got ", block);
  const c10::SymInt rows = out.sym_size(0), cols = out.sym_size(1);
  EXPECT(rows % kRows == 0 && cols % block == 0, "expected rows that ", kRows,
         " divides and columns that the block, ", block, ", divides, but got ", out.sym_sizes());
  check("codes", weight.codes, out, at::kByte, rows * cols / kCodesOfFourBits);
  check_table(weight, out);
  check("scale", weight.scale, out, at::kBFloat16, cols / block * rows);
}

// Blocks of a row and of rows, the last of which may have fewer.
c10::SymInt parts_of(const c10::SymInt& size, int64_t block) {
  EXPECT(block > 0, "expected positive blocks, but got ", block);
  return (size + block - 1) / block;
}

void check_8bit(const Quantized& weight, const at::Tensor& out) {
  check_two_dims(out);
  check("codes", weight.codes, out, weight.is_float8() ? at::kFloat8_e4m3fn : at::kChar,
        out.sym_numel());
  const int64_t matrices = weight.experts.count;
  const c10::SymInt down = parts_of(out.sym_size(0) / matrices, weight.block_rows);
  check("scale", weight.scale, out, at::kFloat,
        matrices * down * parts_of(out.sym_size(1), weight.block));
}

// ---- the CPU ----

template <class Run>
void in_parallel(int64_t pieces, int64_t values_of_piece, const Run& run) {
  at::parallel_for(0, pieces, std::max<int64_t>(1, kGrain / values_of_piece),
                   [&](int64_t begin, int64_t end) { run(cpu::Range{begin, end}); });
}

void dequantize_4bit(const Quantized& weight, at::Tensor& out) {
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  const at::Tensor& scale = weight.scale;
  const bool nested = weight.nested.table.has_value();
  cpu::FourBitArgs args{};
  args.packed = weight.codes.const_data_ptr<uint8_t>(), args.low_first = weight.low_first;
  args.table = weight.table->const_data_ptr<float>();
  args.scale = nested ? nullptr : scale.const_data_ptr<float>();
  args.count = out.numel(), args.block = weight.block;
  args.out = out.mutable_data_ptr(), args.dtype = dtype_of(out.scalar_type());
  in_parallel(scale.numel(), weight.block, [&](cpu::Range blocks) {
    if (!nested) return kernels.four_bits(args, blocks);
    // In the first cache: with blocks of 16 all scales are as many bytes as the codes.
    std::array<float, kScales> scales;
    for (int64_t first = blocks.begin; first < blocks.end; first += kScales) {
      const int64_t last = std::min(blocks.end, first + kScales);
      weight.nested.read(scale, {first, last}, scales.data());
      cpu::FourBitArgs part = args;
      part.packed += first * args.block / kCodesOfFourBits, part.scale = scales.data();
      part.out = static_cast<char*>(args.out) + first * args.block * out.element_size();
      part.count -= first * args.block;
      kernels.four_bits(part, {0, last - first});
    }
  });
}

void dequantize_panels(const Quantized& weight, at::Tensor& out) {
  constexpr int64_t kRows = cpu::PanelArgs::kRows;
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  cpu::PanelArgs args{};
  args.packed = weight.codes.const_data_ptr<uint8_t>();
  args.table = weight.table->const_data_ptr<float>();
  args.scale = static_cast<const cpu::BFloat16*>(weight.scale.const_data_ptr());
  args.rows = out.size(0), args.cols = out.size(1), args.block = weight.block;
  args.out = out.mutable_data_ptr(), args.dtype = dtype_of(out.scalar_type());
  in_parallel(args.rows / kRows, kRows * args.cols,
              [&](cpu::Range panels) { kernels.panels(args, panels); });
}

void dequantize_8bit(const Quantized& weight, at::Tensor& out) {
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  cpu::EightBitArgs args{};
  args.codes = weight.codes.const_data_ptr(), args.is_float8 = weight.is_float8();
  args.scale = weight.scale.const_data_ptr<float>();
  args.multiplier = static_cast<float>(weight.multiplier);
  args.rows = out.size(0) / weight.experts.count, args.cols = out.size(1);
  args.block_rows = weight.block_rows, args.block_cols = weight.block;
  args.out = out.mutable_data_ptr(), args.dtype = dtype_of(out.scalar_type());
  in_parallel(out.size(0), args.cols, [&](cpu::Range rows) { kernels.eight_bits(args, rows); });
}

// ---- CUDA ----

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// On the current stream of out's device; `aligned` of the params counts for what is read.
template <class Params>
void launch(Params& params, const Experts& experts, const at::Tensor& out) {
  params.out = out.mutable_data_ptr();
  params.matrices = static_cast<int>(experts.count);
  params.count = out.numel() / params.matrices;
  params.offs = experts.offs ? experts.offs->const_data_ptr<int>() : nullptr;
  params.first = static_cast<int>(experts.first);
  params.aligned &= is_aligned(params.out, 16);
  const c10::DeviceGuard guard(out.device());
  const std::string error = cuda::launch_dequantize(dtype_of(out.scalar_type()), params,
                                                    kernel_launch::stream_of(out.device()));
  LORA_EXT_CHECK(error.empty(), "dequantising on ", out.device(), " failed: ", error);
}

// The kernels replace the division by a shift.
int bits_of(const char* name, int64_t block, int least) {
  EXPECT(std::has_single_bit(static_cast<uint64_t>(block)) && block >> least > 0 &&
             block <= int64_t{1} << 30,
         "expected on CUDA a ", name, " that is a power of two from ", 1 << least, " on, but got ",
         block);
  return std::countr_zero(static_cast<uint64_t>(block));
}

// Of a block that is all of a matrix's size, bits that shift any place of it to 0.
int bits_of_part(const char* name, int64_t block, int64_t size) {
  return block >= size ? 31 : bits_of(name, block, 0);
}

void dequantize_4bit_cuda(const Quantized& weight, at::Tensor& out) {
  const NestedScale& nested = weight.nested;
  kernel::Dequantize4bitParams params{};
  params.block_bits = bits_of("block", weight.block, params.kMinBlockBits);
  params.packed = weight.codes.const_data_ptr<uint8_t>();
  params.low_first = weight.low_first;
  params.table = weight.table->const_data_ptr<float>();
  if (nested.table) {
    params.scale_block_bits = bits_of("scale_block", nested.block, 1);
    params.scale_codes = weight.scale.const_data_ptr<uint8_t>();
    params.scale_table = nested.table->const_data_ptr<float>();
    params.scale_scale = nested.scale->const_data_ptr<float>();
    params.scale_offset = nested.offset->const_data_ptr<float>();
  } else {
    params.scale = weight.scale.const_data_ptr<float>();
  }
  params.aligned = is_aligned(params.packed, 4);
  EXPECT(weight.experts.count == 1 || out.numel() / weight.experts.count % weight.block == 0,
         "expected experts that begin with a block of ", weight.block, ", but got ",
         weight.experts.count, " of ", out.sizes());
  launch(params, weight.experts, out);
}

template <class Params>
void dequantize_bytes(const Quantized& weight, at::Tensor& out) {
  const int64_t rows = out.size(0) / weight.experts.count, columns = out.size(1);
  EXPECT(std::max(rows, columns) <= std::numeric_limits<int32_t>::max(),
         "expected on CUDA fewer than 2^31 rows and columns, but got ", rows, " and ", columns);
  Params params{};
  params.codes = weight.codes.const_data_ptr();
  params.scale = weight.scale.const_data_ptr<float>();
  params.multiplier = static_cast<float>(weight.multiplier);
  params.rows = rows, params.columns = static_cast<uint32_t>(columns);
  params.row_bits = bits_of_part("block_rows", weight.block_rows, rows);
  params.column_bits = bits_of_part("block", weight.block, columns);
  const int64_t across = cpu::divide_up(columns, weight.block);
  params.scales = cpu::divide_up(rows, weight.block_rows) * across;
  params.scale_columns = static_cast<uint32_t>(across);
  const int64_t chunk = chunk_elements(dtype_of(out.scalar_type()));
  params.aligned = is_aligned(params.codes, 8) && columns % chunk == 0 &&
                   (across == 1 || weight.block % chunk == 0);
  launch(params, weight.experts, out);
}

void dequantize_8bit_cuda(const Quantized& weight, at::Tensor& out) {
  weight.is_float8() ? dequantize_bytes<kernel::DequantizeFloat8Params>(weight, out)
                     : dequantize_bytes<kernel::Dequantize8bitParams>(weight, out);
}

// ---- the op ----

using Write = void (*)(const Quantized& weight, at::Tensor& out);

struct Format {
  const char* name;
  void (*check)(const Quantized& weight, const at::Tensor& out);
  Write on_cpu, on_cuda;  // null: there is no kernel
};

constexpr Format kFormats[] = {
    {"4bit", check_4bit, dequantize_4bit, dequantize_4bit_cuda},
    {"4bit_panels", check_panels, dequantize_panels, nullptr},
    {"8bit", check_8bit, dequantize_8bit, dequantize_8bit_cuda},
};

const Format& format_of(std::string_view name) {
  std::string known;
  for (const Format& format : kFormats) {
    if (format.name == name) return format;
    known += known.empty() ? format.name : std::string(", ") + format.name;
  }
  C10_THROW_ERROR(ValueError, c10::str("lora_ext.", op, ": expected one of the formats ", known,
                                       ", but got ", name));
}

template <Write Format::* on_device>
void dequantize(std::string_view format, const at::Tensor& codes, const at::Tensor& scale,
                at::Tensor& out, const std::optional<at::Tensor>& table, int64_t block,
                int64_t block_rows, bool low_first, const std::optional<at::Tensor>& scale_table,
                const std::optional<at::Tensor>& scale_scale,
                const std::optional<at::Tensor>& scale_offset, int64_t scale_block,
                double multiplier, const std::optional<at::Tensor>& offs, int64_t first,
                int64_t experts) {
  const Quantized weight{codes,
                         scale,
                         table,
                         low_first,
                         block,
                         block_rows,
                         {scale_table, scale_scale, scale_offset, scale_block},
                         multiplier,
                         {offs, first, experts}};
  const Format& found = format_of(format);
  EXPECT_TYPE(is_half(out.scalar_type()) || out.scalar_type() == at::kFloat,
              "expected out in float32, bfloat16 or float16, but got ", out.scalar_type());
  EXPECT(out.is_contiguous(), "expected a contiguous out, but got strides ", out.strides());
  weight.experts.check(out);
  found.check(weight, out);
  if (out.is_meta()) return;  // there is nothing to write
  const Write write = found.*on_device;
  TORCH_CHECK_NOT_IMPLEMENTED(write != nullptr, "lora_ext.", op, ": there is no kernel for ",
                              format, " on ", out.device());
  if (out.numel() != 0) write(weight, out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  // out has so many matrices as `experts`. With offs they are of experts from `first` on: kernels on
  // CUDA leave those of experts without rows as they are, and read none of them.
  m.def(
      "dequantize(str format, Tensor codes, Tensor scale, Tensor(a!) out, *, Tensor? table=None, "
      "int block=2, int block_rows=1, bool low_first=False, Tensor? scale_table=None, Tensor? "
      "scale_scale=None, "
      "Tensor? scale_offset=None, int scale_block=2, float multiplier=1.0, "
      "Tensor? offs=None, int first=0, int experts=1) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl(op, TORCH_FN(dequantize<&Format::on_cpu>)); }

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (cuda::is_built()) m.impl(op, TORCH_FN(dequantize<&Format::on_cuda>));
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl(op, TORCH_FN(dequantize<&Format::on_cpu>)); }

}  // namespace lora_ext::quantized
