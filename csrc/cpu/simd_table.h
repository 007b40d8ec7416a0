// The functions of skinny.h in vector code, for the instruction set of the including file. Included
// after simd_passes.h and simd_few_rows.h, inside an anonymous namespace per file.
#pragma once

template <class Isa>
void shrink_any(const ShrinkArgs& args, Range rows) {
  with_dtype(args.dtype, [&](auto type) { shrink<Isa, decltype(type)>(args, rows); });
}

template <class Isa>
void expand_any(const ExpandArgs& args, Range rows) {
  with_dtype(args.dtype, [&](auto type) { expand<Isa, decltype(type)>(args, rows); });
}

template <class Isa>
void wgrad_any(const WgradArgs& args, const ExpandArgs& expand, Range cols) {
  with_dtype(args.dtype, [&](auto type) { wgrad<Isa, decltype(type)>(args, expand, cols); });
}

template <class Isa>
constexpr SkinnyKernels make_kernels(const char* name) {
  return {name,
          kRowGranule,
          kColGranule,
          shrink_panel_bytes<Isa>,
          pack_shrink<Isa>,
          expand_panel_bytes<Isa>,
          pack_expand<Isa>,
          TLayout{kRowGranule, nullptr, nullptr},
          TLayout{kRowGranule, nullptr, nullptr},
          shrink_any<Isa>,
          expand_any<Isa>,
          wgrad_any<Isa>,
          kFewRows,
          shrink_few<Isa>,
          expand_few<Isa>,
          dropout_bits<Isa>};
}
