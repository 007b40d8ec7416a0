// The mask, and masked copies for the library route. On CUDA the current stream and device come
// through c10's virtual guard: no CUDA header of torch, no libc10_cuda, so that one source links
// against a CPU torch and a CUDA torch alike.
#include "kernels/dropout.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>

#include "common/check.h"
#include "cpu/skinny.h"
#include "kernels/device.h"
#include "op/library/library_route.h"

namespace lora_ext {
namespace {

// The best kernels that are available: the bits are the same with all of them.
const cpu::SkinnyKernels& dropout_kernels() {
  static const cpu::SkinnyKernels& kernels =
      cpu::avx512_kernels() != nullptr ? *cpu::avx512_kernels()
      : cpu::avx2_kernels() != nullptr ? *cpu::avx2_kernels()
                                       : *cpu::portable_kernels();
  return kernels;
}

// Calls row(m, bits) for each of some rows, with the bits of the mask's row number_of(m) as words of
// 32 columns.
template <class Number, class Row>
void for_mask_rows(const DropoutArgs& args, const Number& number_of, int64_t rows, int64_t cols,
                   const Row& row) {
  const auto seed = static_cast<uint64_t>(*args.seed->const_data_ptr<int64_t>());
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, cols));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> bits(static_cast<size_t>((cols + 31) / 32));
    for (int64_t m = begin; m < end; ++m) {
      const cpu::Dropout dropout{seed, args.first_row() + number_of(m), args.first_col(),
                                 args.keep_count()};
      dropout_kernels().dropout_bits(dropout, {}, {0, 1}, {0, cols}, bits.data(),
                                     static_cast<int64_t>(bits.size()));
      row(m, bits.data());
    }
  });
}

bool is_kept(const uint32_t* bits, int64_t c) { return (bits[c / 32] >> (c % 32) & 1u) != 0; }

// out = keep ? scale * x : 0; x and out may be the same tensor.
void drop_cpu(const at::Tensor& x, at::Tensor& out, const DropoutArgs& dropout, int64_t first_row) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "lora_ext_drop", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto scale = static_cast<acc_t>(dropout.keep_scale());
    const auto* in = x.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    const int64_t cols = x.size(1);
    const auto number_of = [&](int64_t m) { return first_row + m; };
    for_mask_rows(dropout, number_of, x.size(0), cols, [&](int64_t m, const uint32_t* bits) {
      for (int64_t c = 0; c < cols; ++c) {
        const auto value = static_cast<acc_t>(in[m * x.stride(0) + c]) * scale;
        to[m * out.stride(0) + c] = static_cast<scalar_t>(is_kept(bits, c) ? value : acc_t{0});
      }
    });
  });
}

// For each byte of bits eight words, all ones for a bit that is set: a vector's mask by one load.
template <class Word>
const std::array<std::array<Word, 8>, 256>& words_of_bytes() {
  static const auto words = [] {
    std::array<std::array<Word, 8>, 256> out{};
    for (size_t byte = 0; byte < out.size(); ++byte) {
      for (size_t bit = 0; bit < 8; ++bit) {
        out[byte][bit] = (byte >> bit & 1u) != 0 ? static_cast<Word>(~Word{0}) : Word{0};
      }
    }
    return out;
  }();
  return words;
}

// x &= mask, whatever the dtype of this size.
template <class Word>
void drop_rows_cpu(at::Tensor& x, const int64_t* mask_rows, const DropoutArgs& dropout) {
  const auto& words = words_of_bytes<Word>();
  auto* data = static_cast<Word*>(x.mutable_data_ptr());
  const int64_t cols = x.size(1), pitch = x.stride(0), whole = cols / 8 * 8;
  const auto number_of = [&](int64_t m) { return mask_rows[m]; };
  for_mask_rows(dropout, number_of, x.size(0), cols, [&](int64_t m, const uint32_t* bits) {
    Word* row = data + m * pitch;
    for (int64_t c = 0; c < whole; c += 8) {
      const auto& kept = words[bits[c / 32] >> (c % 32) & 0xFFu];
      for (size_t i = 0; i < 8; ++i) row[c + static_cast<int64_t>(i)] &= kept[i];
    }
    for (int64_t c = whole; c < cols; ++c) {
      if (!is_kept(bits, c)) row[c] = 0;
    }
  });
}

// ---- CUDA ----

void launch(const at::Tensor& out, const cuda::DropoutParams& params) {
  const c10::DeviceGuard device(out.device());
  const c10::impl::VirtualGuardImpl guard(out.device().type());
  void* stream = guard.getStream(out.device()).native_handle();
  const std::string error = cuda::launch_dropout(dtype_of(out.scalar_type()), params, stream);
  LORA_EXT_CHECK(error.empty(), "launching dropout on ", out.device(), " failed: ", error);
}

cuda::DropoutParams params_of(const at::Tensor& out, const DropoutArgs& dropout,
                              int64_t first_row) {
  cuda::DropoutParams params{};
  params.out = out.mutable_data_ptr(), params.out_pitch = out.stride(0);
  params.rows = out.size(0), params.cols = out.size(1);
  params.seed = dropout.seed->const_data_ptr<int64_t>();
  params.row_offset = dropout.first_row() + first_row, params.col_offset = dropout.first_col();
  params.keep_count = dropout.keep_count(), params.keep_scale = dropout.keep_scale();
  return params;
}

void drop_into(const at::Tensor& x, at::Tensor& out, const DropoutArgs& dropout,
               int64_t first_row) {
  if (x.is_cpu()) return drop_cpu(x, out, dropout, first_row);
  LORA_EXT_CHECK(x.is_cuda() && cuda::is_built(),
                 "expected CPU tensors with dropout in this build, but got ", x.device(),
                 "; lora_ext.build_info() says why CUDA kernels were not built");
  cuda::DropoutParams params = params_of(out, dropout, first_row);
  params.x = x.const_data_ptr(), params.x_pitch = x.stride(0);
  launch(out, params);
}

}  // namespace

void drop_rows_(at::Tensor& x, const at::Tensor& mask_rows, const DropoutArgs& dropout) {
  if (!dropout.enabled() || x.numel() == 0) return;
  const auto* rows = mask_rows.const_data_ptr<int64_t>();
  if (x.is_cuda()) {
    cuda::DropoutParams params = params_of(x, dropout, 0);
    params.x = params.out, params.x_pitch = params.out_pitch;
    params.mask_rows = rows, params.keep_scale = 1.0;
    return launch(x, params);
  }
  switch (x.element_size()) {
    case 2:
      return drop_rows_cpu<uint16_t>(x, rows, dropout);
    case 4:
      return drop_rows_cpu<uint32_t>(x, rows, dropout);
    default:
      return drop_rows_cpu<uint64_t>(x, rows, dropout);
  }
}

at::Tensor dropped(const at::Tensor& x, const DropoutArgs& dropout, int64_t first_row) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  drop_into(x, out, dropout, first_row);
  return out;
}

void drop_(at::Tensor& x, const DropoutArgs& dropout, int64_t first_row) {
  drop_into(x, x, dropout, first_row);
}

void fill_dropout_mask(at::Tensor& mask, const DropoutArgs& dropout) {
  if (mask.is_cuda()) return launch(mask, params_of(mask, dropout, 0));
  const int64_t cols = mask.size(1);
  auto* out = mask.mutable_data_ptr<bool>();
  const auto number_of = [](int64_t m) { return m; };
  for_mask_rows(dropout, number_of, mask.size(0), cols, [&](int64_t m, const uint32_t* bits) {
    for (int64_t c = 0; c < cols; ++c) out[m * cols + c] = is_kept(bits, c);
  });
}

}  // namespace lora_ext
