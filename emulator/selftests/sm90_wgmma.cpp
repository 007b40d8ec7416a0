// wgmma against a product in double: all majors, swizzles and formats, and every N.
#include <cmath>
#include <random>
#include <vector>

#include "emulator/selftests/kernels.h"
#include "emulator/selftests/sm90_descriptor.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

constexpr Major kMajors[] = {Major::kK, Major::kMN};
constexpr uint32_t kThreads = 128, kK = 32;  // two wgmmas along K

// An operand of [rows, 32] elements laid out in shared memory for two k16 steps.
struct Operand {
  std::vector<float> values;    // [rows][32]
  std::vector<uint16_t> image;  // of the shared memory at `start`
  uint64_t step[2];             // descriptors

  float at(int row, int k) const { return values[row * kK + k]; }
};

// A line (a row of a K-major operand, a k of an MN-major one) is cut into pieces of the swizzle's
// width; pieces of one index follow each other line by line, eight lines and then a gap, and a
// piece's chunks are permuted by the line. Unswizzled pieces are the rows of core matrices.
Operand make_operand(std::mt19937& rng, int rows, Format format, Major major, Swizzle mode,
                     uint32_t start) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  Operand out;
  const uint32_t width = swizzle_width(mode) / 2;  // in elements, as all that follows
  const uint32_t lines = major == Major::kK ? rows : kK;
  const uint32_t length = major == Major::kK ? kK : rows;
  const uint32_t pieces = (length + width - 1) / width;
  // Where there is room, no two strides of an operand are the same.
  const uint32_t gap = rows > 128 ? 0 : mode == Swizzle::kNone ? 8 : 8 * width;
  const uint32_t lines8 = 8 * width + gap;
  const uint32_t piece = lines / 8 * lines8 + (mode == Swizzle::kNone ? gap : 0);
  out.image.assign(pieces * piece, 0xFFFF);
  for (int row = 0; row < rows; ++row) {
    for (uint32_t k = 0; k < kK; ++k) {
      const uint16_t bits = from_float(format, uniform(rng));
      out.values.push_back(to_float(format, bits));
      const uint32_t line = major == Major::kK ? row : k, along = major == Major::kK ? k : row;
      const uint32_t chunk = drawn_chunk(line, along % width / 8, mode);
      out.image[along / width * piece + line / 8 * lines8 + line % 8 * width + chunk * 8 +
                along % 8] = bits;
    }
  }
  for (uint32_t step = 0; step < 2; ++step) {
    uint32_t offset, leading, stride;
    if (major == Major::kK) {
      offset = step * 16 / width * piece + step * 16 % width;
      leading = mode == Swizzle::kNone ? piece : 8;
      stride = lines8;
    } else {
      offset = step * 2 * lines8;
      leading = mode == Swizzle::kNone ? lines8 : piece;
      stride = mode == Swizzle::kNone ? piece : lines8;
    }
    out.step[step] = descriptor_bits(start + 2 * offset, 2 * leading, 2 * stride, mode);
  }
  return out;
}

void copy_image(const std::vector<uint16_t>& image, uint32_t start) {
  auto* shared = shared_array<uint16_t>(start);
  for (size_t i = threadIdx.x; i < image.size(); i += kThreads) shared[i] = image[i];
}

struct Element {
  int row, col;
};

// PTX ISA, figure of the accumulator fragment of wgmma.m64nNk16.
Element accumulator_element(uint32_t thread, int reg) {
  return {int(thread / 32 * 16 + thread % 32 / 4 + reg / 2 % 2 * 8),
          int(reg / 4 * 8 + thread % 4 * 2 + reg % 2)};
}

// PTX ISA, figure of the fragment of a in registers.
uint32_t a_fragment(const Operand& a, Format format, uint32_t thread, int reg, uint32_t k0) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + reg % 2 * 8;
  const int k = int(k0) + reg / 2 * 8 + int(thread % 4) * 2;
  return from_float(format, a.at(row, k)) | uint32_t{from_float(format, a.at(row, k + 1))} << 16;
}

struct Problem {
  WgmmaShape shape;
  bool a_in_registers;
  Swizzle swizzle_a, swizzle_b;
  bool accumulate;
};

constexpr uint32_t kStartB = 16 * 1024;

// Operands and schedule depend on the seed that is set.
void check_product(const Problem& problem) {
  const auto [shape, a_in_registers, swizzle_a, swizzle_b, accumulate] = problem;
  std::mt19937 rng(static_cast<unsigned>(config().seed));
  const Operand a = make_operand(rng, 64, shape.format, shape.major_a, swizzle_a, 0);
  const Operand b = make_operand(rng, shape.n, shape.format, shape.major_b, swizzle_b, kStartB);
  const int n = shape.n;
  std::vector<float> d(64 * n);
  const auto initial = [n](int row, int col) { return 0.01f * float(row * n + col); };

  const auto kernel = [&] {
    if (!a_in_registers) copy_image(a.image, 0);
    copy_image(b.image, kStartB);
    fence_proxy_async_shared();
    syncthreads();
    float registers[kMaxN / 2];
    const uint32_t thread = threadIdx.x;
    for (int i = 0; i < n / 2; ++i) {
      const auto [row, col] = accumulator_element(thread, i);
      registers[i] = accumulate ? initial(row, col) : NAN;
    }
    uint32_t fragments[2][4];
    for (int i = 0; i < 8; ++i) {
      fragments[i / 4][i % 4] = a_fragment(a, shape.format, thread, i % 4, i / 4 * 16);
    }
    wgmma_fence();
    for (int step = 0; step < 2; ++step) {
      if (a_in_registers) {
        wgmma_rs(shape, registers, fragments[step], b.step[step], accumulate || step > 0);
      } else {
        wgmma_ss(shape, registers, a.step[step], b.step[step], accumulate || step > 0);
      }
    }
    wgmma_commit_group();
    wgmma_wait_group(0);
    for (int i = 0; i < n / 2; ++i) {
      const auto [row, col] = accumulator_element(thread, i);
      d[row * n + col] = registers[i];
    }
  };
  launch(blocks_of(kThreads, 48 * 1024), kernel);

  for (int row = 0; row < 64; ++row) {
    for (int col = 0; col < n; ++col) {
      double expected = accumulate ? initial(row, col) : 0, magnitude = std::abs(expected);
      for (int k = 0; k < int{kK}; ++k) {
        expected += double(a.at(row, k)) * double(b.at(col, k));
        magnitude += std::abs(double(a.at(row, k)) * double(b.at(col, k)));
      }
      if (!(std::abs(d[row * n + col] - expected) <= (kK + 1) * 0x1p-24 * magnitude)) {
        throw Failure(format("n %d %s a %s b %s: d[%d][%d] is %g, expected %g", n,
                             a_in_registers ? "RS" : "SS", swizzle_name(swizzle_a),
                             swizzle_name(swizzle_b), row, col, d[row * n + col], expected));
      }
    }
  }
}

TEST(product_of_every_layout) {
  const KeepConfig keep;
  config().completion = Completion::Random;
  for (Format format : {Format::kBFloat16, Format::kFloat16}) {
    for (Major major_a : kMajors) {
      for (Major major_b : kMajors) {
        for (Swizzle swizzle_a : kSwizzles) {
          for (Swizzle swizzle_b : kSwizzles) {
            for (int n : {8, 24, 64, 72, 256}) {
              const bool accumulate = ++config().seed % 2 == 0;
              check_product(
                  {{format, n, major_a, major_b}, false, swizzle_a, swizzle_b, accumulate});
            }
          }
        }
      }
    }
  }
}

TEST(product_of_every_n) {
  for (int n = 8; n <= kMaxN; n += 8) {
    const Format format = n % 16 == 0 ? Format::kBFloat16 : Format::kFloat16;
    const Major major = n % 24 == 0 ? Major::kMN : Major::kK;
    check_product({{format, n, Major::kK, major}, false, Swizzle::k128, Swizzle::k128, false});
    check_product({{format, n, Major::kK, major}, true, Swizzle::kNone, Swizzle::k64, true});
  }
}

TEST(product_with_a_in_registers) {
  for (Format format : {Format::kBFloat16, Format::kFloat16}) {
    for (Major major_b : kMajors) {
      for (Swizzle swizzle_b : kSwizzles) {
        for (int n : {8, 96}) {
          check_product({{format, n, Major::kK, major_b}, true, Swizzle::kNone, swizzle_b, true});
        }
      }
    }
  }
}

TEST(product_under_every_schedule) {
  const WgmmaShape shape{Format::kBFloat16, 32, Major::kK, Major::kMN};
  for_each_schedule(5, [&] { check_product({shape, false, Swizzle::k128, Swizzle::k64, true}); });
}

}  // namespace
