// Written by `python scripts/sass.py --record` (scripts/sass_rates.py): what main loops
// reach of the tensor rate, replayed from the machine code of nvcc 13.0.88 (docs/main_loops.md).
#pragma once

namespace lora_ext::plan {

// Of lora_gemm's loop over k; 0 where there is no such kernel.
struct MainLoopRate {
  double plain, masked;
};
// On one card: of the library's kernels, and of those of kTiles, in its order.
struct MainLoopRates {
  double library;
  MainLoopRate tiles[10];
};

constexpr MainLoopRates kMainLoopsOnA100 = {
    0.942,
    {
        {0.907, 0.940},  // 128 x 256
        {0.906, 0.876},  // 128 x 128
        {0.808, 0.802},  // deep 128 x 128
        {0.706, 0.710},  // 128 x 64
        {0.000, 0.000},  // in-grid 128 x 256
        {0.000, 0.000},  // in-grid 128 x 128
        {0.000, 0.000},  // wgmma 128 x 256
        {0.000, 0.000},  // wgmma 128 x 128
        {0.000, 0.000},  // pingpong 128 x 192
        {0.000, 0.000},  // pingpong 128 x 128
    },
};

constexpr MainLoopRates kMainLoopsOnL40S = {
    0.942,
    {
        {0.000, 0.000},  // 128 x 256
        {0.635, 0.661},  // 128 x 128
        {0.936, 0.936},  // deep 128 x 128
        {0.613, 0.613},  // 128 x 64
        {0.000, 0.000},  // in-grid 128 x 256
        {0.000, 0.000},  // in-grid 128 x 128
        {0.000, 0.000},  // wgmma 128 x 256
        {0.000, 0.000},  // wgmma 128 x 128
        {0.000, 0.000},  // pingpong 128 x 192
        {0.000, 0.000},  // pingpong 128 x 128
    },
};

constexpr MainLoopRates kMainLoopsOnH100 = {
    1.000,
    {
        {0.834, 0.848},  // 128 x 256
        {0.780, 0.823},  // 128 x 128
        {0.812, 0.810},  // deep 128 x 128
        {0.556, 0.551},  // 128 x 64
        {1.000, 1.000},  // in-grid 128 x 256
        {0.773, 0.773},  // in-grid 128 x 128
        {1.000, 1.000},  // wgmma 128 x 256
        {0.773, 0.773},  // wgmma 128 x 128
        {0.923, 0.923},  // pingpong 128 x 192
        {0.773, 0.773},  // pingpong 128 x 128
    },
};

}  // namespace lora_ext::plan
