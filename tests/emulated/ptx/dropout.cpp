// Dropout apart from products, launched by csrc/kernels/launch/dropout.cu as nvcc compiles it: every
// type, any offset, rows of the mask in any order. The element's definition is its reference.
#include "kernels/dropout.h"

#include <cuda_runtime.h>  // before the layer, whose macros it does not stand

#include "emulated/kernels/driver.h"
#include "emulated/kernels/reference_mask.h"
#include "emulated/ptx/runtime.h"
#include "kernels/launch/driver.h"

namespace kernels {
namespace {

// What the kernel makes of a kept element.
template <class T>
T scaled(T x, double scale) {
  if constexpr (std::is_same_v<T, bool>) {
    return true;
  } else if constexpr (std::is_same_v<T, double>) {
    return x * scale;
  } else {
    return from_double<T>(static_cast<float>(to_double(x)) * static_cast<float>(scale));
  }
}

template <class T>
void run_dropout(const Case& run) {
  Random random(run.seed);
  const auto draw = [&](uint64_t count) { return static_cast<int64_t>(random() % count); };
  const int64_t rows = run.size.m, cols = run.size.n;
  const int64_t x_pitch = cols + draw(3), out_pitch = cols + draw(3);
  GlobalBuffer<T> x(static_cast<size_t>(rows * x_pitch), "x");
  GlobalBuffer<T> out(static_cast<size_t>(rows * out_pitch), "out");
  for (T& each : x) each = static_cast<T>(static_cast<float>(draw(65)) / 8 - 4);
  std::vector<int64_t> order(static_cast<size_t>(rows));
  for (int64_t& row : order) row = draw(1000);
  const bool reordered = draw(2) != 0;
  const GlobalBuffer<int64_t> seed(std::vector{static_cast<int64_t>(random())}, "seed"),
      mask_rows(order, "mask rows");
  ReferenceMask mask{static_cast<uint64_t>(seed[0]), draw(3) ? draw(1 << 20) : int64_t{1} << 33,
                     draw(100), static_cast<uint32_t>(draw(65537))};

  lora_ext::cuda::DropoutParams p{};
  p.x = std::is_same_v<T, bool> ? nullptr : x.data(), p.out = out.data();
  p.rows = rows, p.cols = cols, p.x_pitch = x_pitch, p.out_pitch = out_pitch;
  p.seed = seed.data(), p.row_offset = mask.row_offset, p.col_offset = mask.col_offset;
  p.mask_rows = reordered ? mask_rows.data() : nullptr;
  p.keep_count = mask.keep_count, p.keep_scale = 1.7;
  emulated::ptx::begin(emulator::config(), 1);
  const std::string error = lora_ext::cuda::launch_dropout(lora_ext::cuda::kDtypeOf<T>, p,
                                                           emulator::cuda::stream_of(0, 0));
  emulated::ptx::end(error.empty() ? cudaSuccess : cudaErrorUnknown);

  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const auto row = static_cast<int>(reordered ? order[static_cast<size_t>(i)] : i);
      const T expected = mask.kept(row, static_cast<int>(j))
                             ? scaled<T>(x[static_cast<size_t>(i * x_pitch + j)], p.keep_scale)
                             : static_cast<T>(0.f);
      const T& got = out[static_cast<size_t>(i * out_pitch + j)];
      if (std::memcmp(&got, &expected, sizeof got) != 0)
        differ("out[%lld, %lld] is not the element of the definition", static_cast<long long>(i),
               static_cast<long long>(j));
    }
  }
}

}  // namespace

const Program program{
    "dropout",
    {{"fp64", run_dropout<double>},
     {"fp32", run_dropout<float>},
     {"bf16", run_dropout<__nv_bfloat16>},
     {"fp16", run_dropout<__half>},
     {"mask", run_dropout<bool>}},
    {{"even", 40, 256, 0}, {"odd", 33, 77, 0}, {"wide", 3, 1030, 0}, {"tiny", 1, 1, 0}}};

}  // namespace kernels
