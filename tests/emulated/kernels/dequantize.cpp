// Runs dequantize_4bit and dequantize_8bit on weights of any size, block, alignment and type, whose
// codes are in either order, int8 or e4m3, and compares every bit with float64, rounded as the CPU's
// kernels round; a NaN is any of them. Of experts without rows
// nothing is written. The race build also counts bytes: those of the weight are written once, those
// of codes read once, and of experts without rows none.
#include "emulated/kernels/dequantize.h"

#include "cpu/dtypes.h"
#include "emulated/kernels/driver.h"
#include "emulated/kernels/operand.h"

namespace kernels {
namespace {

float draw(Random& random, double scale = 1) {
  return static_cast<float>(std::uniform_real_distribution<double>(-scale, scale)(random));
}

std::vector<float> draw_floats(int64_t count, Random& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = draw(random, std::ldexp(1, static_cast<int>(random() % 9)));
  return values;
}

// Product of floats, in double and rounded once; a function of its own, which no compiler fuses.
[[gnu::noinline]] float times(float a, float b) {
  return static_cast<float>(static_cast<double>(a) * b);
}
[[gnu::noinline]] float plus(float a, float b) {
  return static_cast<float>(static_cast<double>(a) + b);
}

// The bits of a value in T, as csrc/cpu/ rounds to it.
template <class T>
uint32_t bits_of(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return lora_ext::cpu::float_to_bits(value);
  } else {
    std::conditional_t<std::is_same_v<T, __half>, lora_ext::cpu::Float16, lora_ext::cpu::BFloat16>
        half;
    lora_ext::cpu::from_float(value, &half);
    return half.bits;
  }
}
template <class T>
uint32_t bits_of_element(const T& element) {
  uint32_t bits = 0;
  memcpy(&bits, &element, sizeof element);
  return bits;
}

constexpr float kUnwrittenValue = -12345;

// Output values, `before` elements into a buffer with more elements after them.
template <class T>
struct Written {
  static constexpr int64_t kBehind = 3;
  static inline const T kUnwritten = from_double<T>(kUnwrittenValue);
  int64_t before, count;
  GlobalBuffer<T> buffer;

  Written(int64_t before_, int64_t count_)
      : before(before_),
        count(count_),
        buffer(static_cast<size_t>(before_ + count_ + kBehind), "out") {
    buffer.fill(kUnwritten);
  }
  T* data() { return buffer.data() + before; }

  void compare(const std::vector<float>& expected) const {
    for (int64_t i = -before; i < count + kBehind; ++i) {
      const bool inside = i >= 0 && i < count;
      const T& written = buffer[static_cast<size_t>(before + i)];
      const bool is_nan = inside && std::isnan(expected[static_cast<size_t>(i)]);
      if (is_nan && std::isnan(to_double(written))) continue;
      const uint32_t wanted =
          inside ? bits_of<T>(expected[static_cast<size_t>(i)]) : bits_of_element(kUnwritten);
      const uint32_t got = bits_of_element(written);
      if (got != wanted)
        differ("out[%lld]: expected bits %x, but got %x", static_cast<long long>(i), wanted, got);
    }
  }
};

// Matrices of experts, some without rows, or some that are of none.
struct Matrices {
  static constexpr int kExperts = 5;
  Random& random;
  const bool of_experts = random() % 2 == 0;
  const int first = of_experts ? static_cast<int>(random() % kExperts) : 0;
  const int count =
      of_experts || random() % 2 ? 1 + static_cast<int>(random() % (kExperts - first)) : 1;
  const GlobalBuffer<int> offs{draw_offs(), "offs"};

  std::vector<int> draw_offs() const {
    std::vector<int> ends;
    for (int expert = 0; expert < kExperts; ++expert)
      ends.push_back((ends.empty() ? 0 : ends.back()) + static_cast<int>(random() % 2 * 3));
    return ends;
  }
  bool has_rows(int matrix) const {
    const int expert = first + matrix;
    return !of_experts || offs[expert] != (expert > 0 ? offs[expert - 1] : 0);
  }
  int with_rows() const {
    int found = 0;
    for (int matrix = 0; matrix < count; ++matrix) found += has_rows(matrix);
    return found;
  }
  void set(DequantizedMatrices& p, int64_t values) const {
    p.count = values / count, p.matrices = count;
    if (of_experts) p.offs = offs.data(), p.first = first;
  }
  std::vector<float> written(std::vector<float> values) const {
    const auto each = values.size() / static_cast<size_t>(count);
    for (int matrix = 0; matrix < count; ++matrix)
      if (!has_rows(matrix)) std::fill_n(values.begin() + matrix * each, each, kUnwrittenValue);
    return values;
  }

  template <class T>
  emulator::LaunchConfig grid(int64_t values) const {
    constexpr int64_t kBlockValues = DequantizedTile<T>::kBlockValues;
    const int64_t blocks = (values / count + kBlockValues - 1) / kBlockValues;
    return {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)),
            .block = dim3(kDequantizeThreads)};
  }
  // Counters of a launch. A warp reads `around` bytes beside its codes, and the ends of its expert.
  template <class T>
  void compare_bytes(int64_t values, double code_bytes, bool aligned, int64_t around) const {
    if (!kRaceChecked || !aligned) return;
    const int64_t written = values / count * with_rows(), tile = DequantizedTile<T>::kValues;
    compare_count("bytes stored", counted_bytes(emulator::GlobalAccess::Store),
                  written * sizeof(T));
    if (values / count % tile != 0) return;
    const int64_t ends = of_experts ? 2 * count - (first == 0) : 0;
    compare_count("bytes loaded", counted_bytes(emulator::GlobalAccess::Load),
                  static_cast<int64_t>(static_cast<double>(written) * code_bytes) +
                      written / tile * around +
                      grid<T>(values).grid.x * kDequantizeThreads * ends * sizeof(int));
  }
};

// Draws whole tiles; one value less, or more; or any number.
template <class T>
int64_t draw_count(int max_tiles, Random& random) {
  constexpr int64_t kTile = DequantizedTile<T>::kValues;
  const auto tiles = static_cast<int64_t>(1 + random() % static_cast<uint64_t>(max_tiles));
  const auto kind = random() % 4;
  if (kind == 0) return tiles * kTile;
  if (kind == 1) return tiles * kTile - 1;
  if (kind == 2) return tiles * kTile + 1;
  return 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(tiles * kTile));
}

// A weight in 4 bits, with scales that are floats or quantised.
struct FourBits {
  Random& random;
  const int64_t count, block, before;  // `before`: bytes in front of the codes
  const bool nested, low_first = random() % 2 == 0;
  const int64_t blocks = (count + block - 1) / block, scale_block = int64_t{2} << random() % 8;
  GlobalBuffer<uint8_t> packed{static_cast<size_t>(before + (count + 1) / 2), "packed"};
  const GlobalBuffer<float> table{draw_floats(16, random), "table"};
  const GlobalBuffer<float> scale{draw_floats(nested ? 1 : blocks, random), "scale"};
  GlobalBuffer<uint8_t> scale_codes{static_cast<size_t>(nested ? blocks : 1), "scale codes"};
  const GlobalBuffer<float> scale_table{draw_floats(256, random), "scale table"};
  const GlobalBuffer<float> scale_scale{
      draw_floats((blocks + scale_block - 1) / scale_block, random), "scale scale"};
  const GlobalBuffer<float> scale_offset{draw_floats(1, random), "scale offset"};

  FourBits(int64_t count_, int64_t block_, bool nested_, int64_t before_, Random& random_)
      : random(random_), count(count_), block(block_), before(before_), nested(nested_) {
    fill(packed), fill(scale_codes);
  }
  void fill(GlobalBuffer<uint8_t>& bytes) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    emulator::race_host_write(bytes.data(), bytes.size());
  }

  Dequantize4bitParams parameters() const {
    Dequantize4bitParams p{};
    p.packed = packed.data() + before, p.table = table.data(), p.low_first = low_first;
    p.block_bits = std::countr_zero(static_cast<uint64_t>(block));
    if (nested) {
      p.scale_codes = scale_codes.data(), p.scale_table = scale_table.data();
      p.scale_scale = scale_scale.data(), p.scale_offset = scale_offset.data();
      p.scale_block_bits = std::countr_zero(static_cast<uint64_t>(scale_block));
    } else {
      p.scale = scale.data();
    }
    return p;
  }
  float scale_of_block(int64_t b) const {
    const auto at = static_cast<size_t>(b);
    if (!nested) return scale[at];
    return plus(times(scale_table[scale_codes[at]], scale_scale[at / scale_block]),
                scale_offset[0]);
  }
  std::vector<float> values() const {
    std::vector<float> found;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t byte = packed[static_cast<size_t>(before + i / 2)];
      const int halves[] = {byte & 15, byte >> 4};  // the lower one, the upper one
      const int code = halves[low_first ? i % 2 : 1 - i % 2];
      found.push_back(times(table[static_cast<size_t>(code)], scale_of_block(i / block)));
    }
    return found;
  }
};

template <class T>
void run_four_bits(const Case& run, Random& random) {
  const auto [name, tiles, max_block, odd] = run.size;
  const int64_t block = std::max(16, max_block >> random() % 3);
  const bool aligned = !odd || random() % 2 == 0;
  const Matrices matrices{random};
  int64_t count = draw_count<T>(tiles, random);
  if (matrices.count > 1) count = (count + block - 1) / block * block * matrices.count;
  const FourBits weight(count, block, random() % 2,
                        aligned ? 4 * static_cast<int64_t>(random() % 3) : 1, random);
  // Only one of the two may begin in the middle of a chunk.
  Written<T> out(aligned || random() % 2 == 0 ? 0 : 1, weight.count);
  Dequantize4bitParams p = weight.parameters();
  p.out = out.data(), p.aligned = aligned;
  matrices.set(p, count);
  emulator::Stream stream;
  stream.launch(matrices.grid<T>(count), dequantize_4bit<T>, p);
  run_timed(stream);
  out.compare(matrices.written(weight.values()));
  const int64_t scale_bytes = weight.nested ? 1 + 3 * sizeof(float) : sizeof(float);
  const int64_t scales = std::max<int64_t>(32, DequantizedTile<T>::kValues / block);
  matrices.compare_bytes<T>(count, 0.5, aligned, scales * scale_bytes + 32 * sizeof(float));
}

// e4m3: a sign, 4 bits of exponent, whose bias is 7, and 3 of mantissa; all ones are NaN.
float value_of_float8(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return static_cast<float>(code >> 7 ? -size : size);
}

// How many of a matrix' rows, or of its columns, share a scale: one, some or all.
struct Block {
  int64_t size, parts;  // of the last of the parts some may be missing
  int bits;

  static Block all(int64_t of) { return {of, 1, 31}; }
  static Block of_bits(int64_t of, int bits) {
    const int64_t size = int64_t{1} << bits;
    return {size, (of + size - 1) / size, bits};
  }
};

// Matrices in 8 bits with a scale for each block.
struct EightBits {
  Random& random;
  const int64_t matrices, rows, columns, before;  // `before`: bytes in front of the codes
  const bool is_float8;
  const Block of_rows, of_columns;
  GlobalBuffer<uint8_t> codes{static_cast<size_t>(before + matrices * rows * columns), "codes"};
  const GlobalBuffer<float> scale{draw_floats(matrices * of_rows.parts * of_columns.parts, random),
                                  "scale"};
  const float multiplier = random() % 2 ? 1.f : 1.f / 127.f;

  void fill() {
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
    emulator::race_host_write(codes.data(), codes.size());
  }
  template <class Params>
  Params parameters() const {
    Params p{};
    p.codes = codes.data() + before, p.scale = scale.data(), p.multiplier = multiplier;
    p.rows = rows, p.columns = static_cast<uint32_t>(columns);
    p.row_bits = of_rows.bits, p.column_bits = of_columns.bits;
    p.scales = of_rows.parts * of_columns.parts;
    p.scale_columns = static_cast<uint32_t>(of_columns.parts);
    return p;
  }
  std::vector<float> values() const {
    std::vector<float> found;
    for (int64_t matrix = 0; matrix < matrices; ++matrix)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) {
          const uint8_t code = codes[static_cast<size_t>(before) + found.size()];
          const int64_t down = matrix * of_rows.parts + row / of_rows.size;
          const int64_t at = down * of_columns.parts + column / of_columns.size;
          found.push_back(times(is_float8 ? value_of_float8(code) : static_cast<int8_t>(code),
                                times(scale[static_cast<size_t>(at)], multiplier)));
        }
    return found;
  }
};

// One row, a power of two, or all; chunks of a row: all, or a power of two of them.
Block draw_rows(int64_t rows, Random& random) {
  const auto kind = random() % 3;
  return kind == 0 ? Block::all(rows)
                   : Block::of_bits(rows, kind == 1 ? 0 : 1 + static_cast<int>(random() % 5));
}
Block draw_columns(int64_t columns, int64_t least, Random& random) {
  if (random() % 2) return Block::all(columns);
  return Block::of_bits(
      columns, std::countr_zero(static_cast<uint64_t>(least)) + static_cast<int>(random() % 6));
}

template <class T>
void run_eight_bits(const Case& run, Random& random) {
  constexpr int64_t kChunk = DequantizedTile<T>::kChunk;
  const auto [name, tiles, max_columns, odd] = run.size;
  const bool aligned = !odd || random() % 2 == 0;
  // Rows of at least a chunk, of which tiles may have a whole number; unaligned ones with any
  // number of columns.
  auto columns = static_cast<int64_t>(1 + random() % static_cast<uint64_t>(max_columns));
  if (aligned) columns = kChunk * (random() % 2 ? columns : int64_t{1} << random() % 6);
  const Matrices matrices{random};
  const int64_t rows = (draw_count<T>(tiles, random) + columns - 1) / columns;
  const int64_t count = matrices.count * rows * columns;
  EightBits weight{random,
                   matrices.count,
                   rows,
                   columns,
                   aligned ? 8 * static_cast<int64_t>(random() % 3) : 3,
                   random() % 2 == 0,
                   draw_rows(rows, random),
                   draw_columns(columns, aligned ? kChunk : 1, random)};
  weight.fill();
  Written<T> out(aligned || random() % 2 == 0 ? 0 : 1, count);
  emulator::Stream stream;
  const auto launch = [&](auto kernel, auto p) {
    p.out = out.data(), p.aligned = aligned;
    matrices.set(p, count);
    stream.launch(matrices.grid<T>(count), kernel, p);
  };
  if (weight.is_float8)
    launch(dequantize_8bit<T, DequantizeFloat8Params>, weight.parameters<DequantizeFloat8Params>());
  else
    launch(dequantize_8bit<T, Dequantize8bitParams>, weight.parameters<Dequantize8bitParams>());
  run_timed(stream);
  out.compare(matrices.written(weight.values()));
  // Whatever the blocks: each lane reads a scale for each of its chunks.
  constexpr int64_t kScaleBytes = DequantizedTile<T>::kChunks * 32 * sizeof(float);
  matrices.compare_bytes<T>(count, 1, aligned, kScaleBytes);
}

template <class T>
void run_dequantize(const Case& run) {
  Random random(run.seed);
  return random() % 2 ? run_eight_bits<T>(run, random) : run_four_bits<T>(run, random);
}

}  // namespace

// Most tiles, most values of a block (or chunks of a row), and whether operands may be unaligned.
#define VARIANT(name, ...) {#name, run_dequantize<__VA_ARGS__>},
const Program program{"dequantize",
                      {DEQUANTIZE_VARIANTS(VARIANT)},
                      {{"blocks_of_128", 3, 128, 0},
                       {"blocks_of_4096", 10, 4096, 0},
                       {"unaligned", 2, 256, 1},
                       {"blocks_of_16", 3, 16, 0}}};

}  // namespace kernels
