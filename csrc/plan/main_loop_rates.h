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
  MainLoopRate tiles[9];
};

constexpr MainLoopRates kMainLoopsOnA100 = {
    0.942,
    {
        {0.599, 0.000},  // 128 x 256
        {0.459, 0.486},  // 128 x 128
        {0.491, 0.457},  // 128 x 64
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
        {0.000, 0.000},  // 128 x 128
        {0.478, 0.476},  // 128 x 64
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
        {0.523, 0.000},  // 128 x 256
        {0.374, 0.367},  // 128 x 128
        {0.351, 0.374},  // 128 x 64
        {1.000, 1.000},  // in-grid 128 x 256
        {0.773, 0.773},  // in-grid 128 x 128
        {1.000, 1.000},  // wgmma 128 x 256
        {0.773, 0.773},  // wgmma 128 x 128
        {0.923, 0.923},  // pingpong 128 x 192
        {0.773, 0.773},  // pingpong 128 x 128
    },
};

}  // namespace lora_ext::plan
