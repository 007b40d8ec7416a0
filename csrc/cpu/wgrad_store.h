// Writes the sums of wgrad into g. Shared by the passes of every instruction set; included inside
// an anonymous namespace per file, after its target pragma.
#pragma once

// Calls run with a value of the element type named by `dtype`.
template <class Run>
void with_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return run(BFloat16{});
    case Dtype::kFloat16:
      return run(Float16{});
    default:
      return run(float{});
  }
}

// G(j, c) = scale * sums[j, c - cols.begin], along the contiguous dimension of g: dlora_b is
// [N, rank].
template <class T>
void store_wgrad_as(const WgradArgs& args, Range cols, const float* sums, int64_t sums_pitch) {
  T* out = static_cast<T*>(args.g) + cols.begin * args.g_col_pitch;
  const int64_t count = cols.end - cols.begin;
  if (args.g_rank_pitch == 1) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < args.rank; ++j) {
        from_float(args.scale * sums[j * sums_pitch + i], &out[i * args.g_col_pitch + j]);
      }
    }
    return;
  }
  for (int64_t j = 0; j < args.rank; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      from_float(args.scale * sums[j * sums_pitch + i],
                 &out[j * args.g_rank_pitch + i * args.g_col_pitch]);
    }
  }
}

inline void store_wgrad(const WgradArgs& args, Range cols, const float* sums, int64_t sums_pitch) {
  with_dtype(args.g_dtype,
             [&](auto type) { store_wgrad_as<decltype(type)>(args, cols, sums, sums_pitch); });
}
