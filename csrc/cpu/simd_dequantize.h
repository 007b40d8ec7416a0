// The functions of dequantize.h in vector code, for the instruction set of the including file.
// Included after simd_passes.h, inside an anonymous namespace per file. An Isa has, in addition to
// what the passes need:
//
//     Table(values, low_first)    16 floats for lookup, and which code of a byte is the first
//     lookup(table, p)            table[code] for the first kLanes codes at p, two per byte
//     load(const int8_t*), load(const Float8*)
#pragma once

// table[code] * scale for `count` codes; the first begins a byte.
template <class Isa, class T>
void dequantize_run(const typename Isa::Table& lanes, const float* table, bool low_first,
                    const uint8_t* packed, int64_t count, float scale, T* out) {
  const typename Isa::Vec factor = Isa::broadcast(scale);
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
    Isa::store(out + i, Isa::multiply(Isa::lookup(lanes, packed + i / 2), factor));
  }
  for (; i < count; ++i) {
    const bool is_low = (i % 2 == 0) == low_first;
    const int code = is_low ? packed[i / 2] & 15 : packed[i / 2] >> 4;
    from_float(table[code] * scale, out + i);
  }
}

template <class Isa, class T>
void four_bits(FourBitArgs args, Range blocks) {  // by value: in registers beside stores to out
  const typename Isa::Table lanes(args.table, args.low_first);
  T* out = static_cast<T*>(args.out);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t first = b * args.block;
    const int64_t count = std::min(args.block, args.count - first);
    dequantize_run<Isa>(lanes, args.table, args.low_first, args.packed + first / 2, count,
                        args.scale[b], out + first);
  }
}

// First reorders the codes of 32 columns into the order of four_bits, row after row: bytes move
// once, within a kilobyte.
template <class Isa, class T>
void panels(const PanelArgs& args, Range panels) {
  constexpr int64_t kCols = 32, kBytes = kCols / 2, kRows = PanelArgs::kRows;
  const typename Isa::Table lanes(args.table, false);
  uint8_t rows[kRows][kBytes];
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const uint8_t* panel = args.packed + p * kRows * (args.cols / 2);
    T* out = static_cast<T*>(args.out) + p * kRows * args.cols;
    for (int64_t col = 0; col < args.cols; col += kCols) {
      for (int64_t pair = 0; pair < kBytes; ++pair) {
        const uint8_t* bytes = panel + (col / 2 + pair) * kRows;
        for (int64_t i = 0; i < kRows / 2; ++i) {
          const uint8_t even = bytes[2 * i], odd = bytes[2 * i + 1];
          rows[i][pair] = static_cast<uint8_t>(even << 4 | (odd & 15));
          rows[kRows / 2 + i][pair] = static_cast<uint8_t>((even & 0xF0) | odd >> 4);
        }
      }
      const BFloat16* scale = args.scale + col / args.block * args.rows + p * kRows;
      for (int64_t row = 0; row < kRows; ++row) {
        dequantize_run<Isa>(lanes, args.table, false, rows[row], kCols, to_float(scale[row]),
                            out + row * args.cols + col);
      }
    }
  }
}

template <class Isa, class Code, class T>
void eight_bits(const EightBitArgs& args, Range rows) {
  const int64_t down = divide_up(args.rows, args.block_rows);
  const int64_t across = divide_up(args.cols, args.block_cols);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Code* codes = static_cast<const Code*>(args.codes) + row * args.cols;
    T* out = static_cast<T*>(args.out) + row * args.cols;
    const int64_t matrix = row / args.rows, own = row % args.rows;
    const float* scale = args.scale + (matrix * down + own / args.block_rows) * across;
    for (int64_t i = 0; i < args.cols; ++scale) {
      const int64_t end = std::min(args.cols, i + args.block_cols);
      const float factor = *scale * args.multiplier;
      const typename Isa::Vec factors = Isa::broadcast(factor);
      for (; i + Isa::kLanes <= end; i += Isa::kLanes) {
        Isa::store(out + i, Isa::multiply(Isa::load(codes + i), factors));
      }
      for (; i < end; ++i) from_float(to_float(codes[i]) * factor, out + i);
    }
  }
}

template <class Isa>
void four_bits_any(const FourBitArgs& args, Range blocks) {
  with_dtype(args.dtype, [&](auto type) { four_bits<Isa, decltype(type)>(args, blocks); });
}

template <class Isa>
void panels_any(const PanelArgs& args, Range range) {
  with_dtype(args.dtype, [&](auto type) { panels<Isa, decltype(type)>(args, range); });
}

template <class Isa>
void eight_bits_any(const EightBitArgs& args, Range rows) {
  with_dtype(args.dtype, [&](auto type) {
    args.is_float8 ? eight_bits<Isa, Float8, decltype(type)>(args, rows)
                   : eight_bits<Isa, int8_t, decltype(type)>(args, rows);
  });
}

template <class Isa>
constexpr DequantizeKernels make_dequantize() {
  return {four_bits_any<Isa>, panels_any<Isa>, eight_bits_any<Isa>};
}
