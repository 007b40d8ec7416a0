// lora_ext::dequantize_4bit, dequantize_4bit_panels and dequantize_8bit write a frozen weight as
// floating values into a tensor of the caller's. Panels exist on the CPU only.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/check.h"
#include "cpu/dispatch.h"
#include "cpu/operands.h"
#include "kernels/device.h"
#include "op/launch/dequantize_launch.h"

namespace lora_ext {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values worth a thread's start, about 5 us

// Tensors on different devices are dispatched to the kernel of one of the devices; with a meta
// tensor among them that kernel would write nothing.
void check(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& out,
           at::ScalarType dtype, const c10::SymInt& count) {
  EXPECT(tensor.device() == out.device(), "expected ", name, " on out's device, ", out.device(),
         ", but got it on ", tensor.device());
  EXPECT_TYPE(tensor.scalar_type() == dtype, "expected ", name, " in ", dtype, ", but got ",
              tensor.scalar_type());
  EXPECT(tensor.is_contiguous(), "expected a contiguous ", name, ", but got strides ",
         tensor.strides());
  EXPECT(tensor.sym_numel() == count, "expected ", name, " of ", count, " elements, but got ",
         tensor.sym_numel());
}

void check_out(const char* op, const at::Tensor& out) {
  EXPECT_TYPE(is_half(out.scalar_type()) || out.scalar_type() == at::kFloat,
              "expected out in float32, bfloat16 or float16, but got ", out.scalar_type());
  EXPECT(out.is_contiguous(), "expected a contiguous out, but got strides ", out.strides());
}

c10::SymInt blocks_of(const char* op, const c10::SymInt& count, int64_t block) {
  EXPECT(block >= 2 && block % 2 == 0, "expected an even block, but got ", block);
  return count / block + (count % block != 0 ? 1 : 0);
}

// Scales that are 8-bit codes themselves: table[code] * scale[i / block] + offset, rounded after
// the product and after the sum.
struct NestedScale {
  std::optional<at::Tensor> table{};   // [256]
  std::optional<at::Tensor> scale{};   // one for each block of codes
  std::optional<at::Tensor> offset{};  // one element
  int64_t block = 1;

  void read(const at::Tensor& codes, cpu::Range range, float* out) const {
    const uint8_t* code = codes.const_data_ptr<uint8_t>();
    const float* values = table->const_data_ptr<float>();
    const float* factor = scale->const_data_ptr<float>();
    const float added = *offset->const_data_ptr<float>();
    for (int64_t i = range.begin; i < range.end; ++i) {
      out[i - range.begin] = values[code[i]] * factor[i / block] + added;
    }
  }
};

void check_4bit(const at::Tensor& packed, const at::Tensor& table, const at::Tensor& scale,
                int64_t block, const NestedScale& nested, const at::Tensor& out) {
  const char* op = "dequantize_4bit";
  check_out(op, out);
  const c10::SymInt count = out.sym_numel(), blocks = blocks_of(op, count, block);
  check(op, "packed", packed, out, at::kByte, (count + 1) / 2);
  check(op, "table", table, out, at::kFloat, 16);
  check(op, "scale", scale, out, nested.table ? at::kByte : at::kFloat, blocks);
  EXPECT(nested.table.has_value() == nested.scale.has_value() &&
             nested.table.has_value() == nested.offset.has_value(),
         "expected all of scale_table, scale_scale and scale_offset, or none");
  if (!nested.table) return;
  check(op, "scale_table", *nested.table, out, at::kFloat, 256);
  check(op, "scale_scale", *nested.scale, out, at::kFloat, blocks_of(op, blocks, nested.block));
  check(op, "scale_offset", *nested.offset, out, at::kFloat, 1);
}

void dequantize_4bit(const at::Tensor& packed, const at::Tensor& table, const at::Tensor& scale,
                     int64_t block, const std::optional<at::Tensor>& scale_table,
                     const std::optional<at::Tensor>& scale_scale,
                     const std::optional<at::Tensor>& scale_offset, int64_t scale_block,
                     at::Tensor& out) {
  const NestedScale nested{scale_table, scale_scale, scale_offset, scale_block};
  check_4bit(packed, table, scale, block, nested, out);
  if (out.numel() == 0) return;
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  at::Tensor scales = nested.table ? at::empty({scale.numel()}, table.options()) : scale;
  float* read = nested.table ? scales.mutable_data_ptr<float>() : nullptr;
  const cpu::FourBitArgs args{packed.const_data_ptr<uint8_t>(),
                              table.const_data_ptr<float>(),
                              scales.const_data_ptr<float>(),
                              out.numel(),
                              block,
                              out.mutable_data_ptr(),
                              cpu::dtype_of(out.scalar_type())};
  at::parallel_for(0, scale.numel(), std::max<int64_t>(1, kGrain / block),
                   [&](int64_t begin, int64_t end) {
                     const cpu::Range blocks{begin, end};
                     if (read != nullptr) nested.read(scale, blocks, read + begin);
                     kernels.four_bits(args, blocks);
                   });
}

void check_panels(const at::Tensor& packed, const at::Tensor& table, const at::Tensor& scale,
                  int64_t block, const at::Tensor& out) {
  const char* op = "dequantize_4bit_panels";
  constexpr int64_t kRows = cpu::PanelArgs::kRows;
  check_out(op, out);
  EXPECT(out.dim() == 2, "expected out of 2 dimensions, but got shape ", out.sym_sizes());
  EXPECT(block >= 32 && block % 32 == 0, "expected a block that 32 divides, but got ", block);
  const c10::SymInt rows = out.sym_size(0), cols = out.sym_size(1);
  EXPECT(rows % kRows == 0 && cols % block == 0, "expected rows that ", kRows,
         " divides and columns that the block, ", block, ", divides, but got ", out.sym_sizes());
  check(op, "packed", packed, out, at::kByte, rows * cols / 2);
  check(op, "table", table, out, at::kFloat, 16);
  check(op, "scale", scale, out, at::kBFloat16, cols / block * rows);
}

void dequantize_4bit_panels(const at::Tensor& packed, const at::Tensor& table,
                            const at::Tensor& scale, int64_t block, at::Tensor& out) {
  check_panels(packed, table, scale, block, out);
  if (out.numel() == 0) return;
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  const cpu::PanelArgs args{packed.const_data_ptr<uint8_t>(),
                            table.const_data_ptr<float>(),
                            static_cast<const cpu::BFloat16*>(scale.const_data_ptr()),
                            out.size(0),
                            out.size(1),
                            block,
                            out.mutable_data_ptr(),
                            cpu::dtype_of(out.scalar_type())};
  constexpr int64_t kRows = cpu::PanelArgs::kRows;
  at::parallel_for(
      0, args.rows / kRows, std::max<int64_t>(1, kGrain / (kRows * args.cols)),
      [&](int64_t begin, int64_t end) { kernels.panels(args, cpu::Range{begin, end}); });
}

void check_8bit(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& out) {
  const char* op = "dequantize_8bit";
  check_out(op, out);
  EXPECT(out.dim() == 2, "expected out of 2 dimensions, but got shape ", out.sym_sizes());
  check(op, "codes", codes, out, at::kChar, out.sym_numel());
  check(op, "scale", scale, out, at::kFloat, out.sym_size(0));
}

void dequantize_8bit(const at::Tensor& codes, const at::Tensor& scale, double multiplier,
                     at::Tensor& out) {
  check_8bit(codes, scale, out);
  if (out.numel() == 0) return;
  const cpu::DequantizeKernels& kernels = cpu::dequantize_kernels();
  const cpu::EightBitArgs args{codes.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(),
                               static_cast<float>(multiplier), out.size(1),
                               out.mutable_data_ptr(),         cpu::dtype_of(out.scalar_type())};
  at::parallel_for(
      0, out.size(0), std::max<int64_t>(1, kGrain / args.cols),
      [&](int64_t begin, int64_t end) { kernels.eight_bits(args, cpu::Range{begin, end}); });
}

// The kernels replace the division by a shift.
int bits_of(const char* op, const char* name, int64_t block, int least) {
  EXPECT(std::has_single_bit(static_cast<uint64_t>(block)) && block >> least > 0 &&
             block <= int64_t{1} << 30,
         "expected on CUDA a ", name, " that is a power of two from ", 1 << least, " on, but got ",
         block);
  return std::countr_zero(static_cast<uint64_t>(block));
}

void dequantize_4bit_cuda(const at::Tensor& packed, const at::Tensor& table,
                          const at::Tensor& scale, int64_t block,
                          const std::optional<at::Tensor>& scale_table,
                          const std::optional<at::Tensor>& scale_scale,
                          const std::optional<at::Tensor>& scale_offset, int64_t scale_block,
                          at::Tensor& out) {
  const char* op = "dequantize_4bit";
  const NestedScale nested{scale_table, scale_scale, scale_offset, scale_block};
  check_4bit(packed, table, scale, block, nested, out);
  kernel::Dequantize4bitParams params{};
  params.block_bits = bits_of(op, "block", block, kernel::Dequantize4bitParams::kLeastBlockBits);
  if (nested.table) params.scale_block_bits = bits_of(op, "scale_block", scale_block, 1);
  if (out.numel() == 0) return;
  params.packed = packed.const_data_ptr<uint8_t>();
  params.table = table.const_data_ptr<float>();
  if (nested.table) {
    params.scale_codes = scale.const_data_ptr<uint8_t>();
    params.scale_table = nested.table->const_data_ptr<float>();
    params.scale_scale = nested.scale->const_data_ptr<float>();
    params.scale_offset = nested.offset->const_data_ptr<float>();
  } else {
    params.scale = scale.const_data_ptr<float>();
  }
  cuda::dequantize(params, out);
}

void dequantize_8bit_cuda(const at::Tensor& codes, const at::Tensor& scale, double multiplier,
                          at::Tensor& out) {
  const char* op = "dequantize_8bit";
  check_8bit(codes, scale, out);
  EXPECT(out.size(1) <= std::numeric_limits<int32_t>::max(),
         "expected on CUDA fewer than 2^31 columns, but got ", out.size(1));
  if (out.numel() == 0) return;
  kernel::Dequantize8bitParams params{};
  params.codes = codes.const_data_ptr<int8_t>();
  params.scale = scale.const_data_ptr<float>();
  params.multiplier = static_cast<float>(multiplier);
  cuda::dequantize(params, out);
}

void dequantize_4bit_meta(const at::Tensor& packed, const at::Tensor& table,
                          const at::Tensor& scale, int64_t block,
                          const std::optional<at::Tensor>& scale_table,
                          const std::optional<at::Tensor>& scale_scale,
                          const std::optional<at::Tensor>& scale_offset, int64_t scale_block,
                          at::Tensor& out) {
  check_4bit(packed, table, scale, block, {scale_table, scale_scale, scale_offset, scale_block},
             out);
}

void dequantize_4bit_panels_meta(const at::Tensor& packed, const at::Tensor& table,
                                 const at::Tensor& scale, int64_t block, at::Tensor& out) {
  check_panels(packed, table, scale, block, out);
}

void dequantize_8bit_meta(const at::Tensor& codes, const at::Tensor& scale, double /*multiplier*/,
                          at::Tensor& out) {
  check_8bit(codes, scale, out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "dequantize_4bit(Tensor packed, Tensor table, Tensor scale, int block, Tensor? scale_table, "
      "Tensor? scale_scale, Tensor? scale_offset, int scale_block, Tensor(a!) out) -> ()",
      tags);
  m.def(
      "dequantize_4bit_panels(Tensor packed, Tensor table, Tensor scale, int block, "
      "Tensor(a!) out) -> ()",
      tags);
  m.def("dequantize_8bit(Tensor codes, Tensor scale, float multiplier, Tensor(a!) out) -> ()",
        tags);
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("dequantize_4bit", TORCH_FN(dequantize_4bit));
  m.impl("dequantize_4bit_panels", TORCH_FN(dequantize_4bit_panels));
  m.impl("dequantize_8bit", TORCH_FN(dequantize_8bit));
}

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  if (!cuda::is_built()) return;
  m.impl("dequantize_4bit", TORCH_FN(dequantize_4bit_cuda));
  m.impl("dequantize_8bit", TORCH_FN(dequantize_8bit_cuda));
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("dequantize_4bit", TORCH_FN(dequantize_4bit_meta));
  m.impl("dequantize_4bit_panels", TORCH_FN(dequantize_4bit_panels_meta));
  m.impl("dequantize_8bit", TORCH_FN(dequantize_8bit_meta));
}

}  // namespace lora_ext
