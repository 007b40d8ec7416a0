// Our layouts against CuTe's (headers of the wheel nvidia-cutlass): register fragments, ldmatrix
// and stmatrix, swizzles, and matrix descriptors with the addresses that they lead to. Runs on the
// host.
//
//     layouts                  prints each check with its number of comparisons
//     layouts --perturb NAME   the same, with the last of our values in check NAME wrong
//
// The last line is the sum of them; the exit status is 1 if there are any mismatches.
#include <cstddef>
#include <cstdint>

// CuTe asks where in shared memory a pointer points; here shared memory is this array, at address
// 0.
alignas(4096) static unsigned char shared_memory[64 * 1024];
static size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - shared_memory;
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cuda_runtime.h>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
//
#include <cstdio>
#include <string>
#include <vector>

#include "emulator/copies/swizzle.h"
#include "emulator/matrix/descriptor.h"
#include "emulator/matrix/layouts.h"
#include "ptx/wgmma_operands.h"

namespace {

namespace gmma = cute::SM90::GMMA;
using emulator::Major;
using emulator::Position;

// ---- comparing ----------------------------------------------------------------------------------

std::string perturbed_check;
long total_comparisons = 0, total_mismatches = 0;

// The comparisons of one layout, printed at its end.
class Check {
 public:
  explicit Check(std::string name) : name_(std::move(name)) {}

  void equal(int64_t ours, int64_t cutes) {
    ours_.push_back(ours);
    cutes_.push_back(cutes);
  }

  ~Check() {
    if (name_ == perturbed_check) ++ours_.back();
    int mismatches = 0;
    for (size_t i = 0; i < ours_.size(); ++i) {
      if (ours_[i] != cutes_[i] && mismatches++ == 0) {
        std::printf("comparison %zu: ours is %ld, CuTe's %ld\n", i, static_cast<long>(ours_[i]),
                    static_cast<long>(cutes_[i]));
      }
    }
    std::printf("%s: %zu comparisons, %d mismatches\n", name_.c_str(), ours_.size(), mismatches);
    total_comparisons += static_cast<long>(ours_.size());
    total_mismatches += mismatches;
  }

 private:
  std::string name_;
  std::vector<int64_t> ours_, cutes_;
};

// ---- register fragments -------------------------------------------------------------------------

// CuTe numbers the elements of an m x n tile column by column.
int64_t column_major(Position at, int64_t rows) { return at.row + rows * at.col; }

template <typename Traits>
void check_mma(const char* name) {
  Check check(name);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t value = 0; value < 8; ++value) {
      const Position at = emulator::mma_a(lane, value / 2, value % 2);
      check.equal(column_major(at, 16), typename Traits::ALayout{}(lane, value));
    }
    for (uint32_t value = 0; value < 4; ++value) {
      const Position at = emulator::mma_b(lane, value / 2, value % 2);
      check.equal(column_major({at.col, at.row}, 8), typename Traits::BLayout{}(lane, value));
    }
    for (uint32_t value = 0; value < 4; ++value) {
      const Position at = emulator::mma_c(lane, value);
      check.equal(column_major(at, 16), typename Traits::CLayout{}(lane, value));
    }
  }
}

template <int N>
void check_wgmma_d() {
  Check check("wgmma d, n = " + std::to_string(N));
  for (uint32_t thread = 0; thread < 128; ++thread) {
    for (uint32_t reg = 0; reg < N / 2; ++reg) {
      const Position at = emulator::wgmma_d(thread, reg);
      check.equal(column_major(at, 64), gmma::CLayout_64xN<N>{}(thread, reg));
    }
  }
}

void check_wgmma_a() {
  using Instruction = gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;
  Check check("wgmma a in registers");
  for (uint32_t thread = 0; thread < 128; ++thread) {
    for (uint32_t value = 0; value < 8; ++value) {
      const Position at = emulator::wgmma_a(thread, value / 2, value % 2);
      check.equal(column_major(at, 64), cute::MMA_Traits<Instruction>::ALayout{}(thread, value));
    }
  }
}

// ---- ldmatrix and stmatrix ----------------------------------------------------------------------

// Which (lane, bit) of memory, as CuTe's `Memory` layout names its bits, is bit number `wanted`. A
// lane's memory is the 128-bit row that it addresses.
template <typename Memory>
int64_t place_in_memory(int64_t wanted) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int bit = 0; bit < 128; bit += 16) {
      if (Memory{}(lane, bit) == wanted) return lane * 128 + bit;
    }
  }
  return -1;
}

// Copy: an atom of CuTe; of a load from memory, or of a store.
template <typename Copy, bool kLoad>
void check_matrix_move(const char* name, uint32_t matrices, bool transposed) {
  using Traits = cute::Copy_Traits<Copy>;
  using Source = typename Traits::SrcLayout;
  using Target = typename Traits::DstLayout;
  using Registers = std::conditional_t<kLoad, Target, Source>;
  using Memory = std::conditional_t<kLoad, Source, Target>;
  Check check(name);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t reg = 0; reg < matrices; ++reg) {
      for (uint32_t half = 0; half < 2; ++half) {
        const Position at = transposed ? emulator::matrix_8x8_transposed(lane, half)
                                       : emulator::matrix_8x8(lane, half);
        const uint32_t addressing_lane = 8 * reg + at.row;
        if (emulator::matrix_of_address(addressing_lane) != reg) check.equal(-2, -1);
        const int64_t bit_of_register = static_cast<int64_t>(reg * 2 + half) * 16;
        check.equal(addressing_lane * 128 + 16 * at.col,
                    place_in_memory<Memory>(Registers{}(lane, bit_of_register)));
      }
    }
  }
}

// ---- swizzles and descriptors -------------------------------------------------------------------

template <int kBits>
void check_swizzle(const char* name, emulator::Swizzle mode) {
  Check check(name);
  for (uint32_t address = 0; address < 8192; ++address) {
    check.equal(emulator::swizzle(address, mode), cute::Swizzle<kBits, 4, 3>{}(address));
  }
}

// A tile [rows, 64] of 16-bit elements, made of CuTe's atoms column by column, as a wgmma
// descriptor describes it.
struct Description {
  Major major;
  lora_ext::ptx::Swizzle swizzle;
  uint32_t rows;

  uint32_t width() const {
    return 16u << static_cast<uint32_t>(swizzle);
  }  // bytes of a swizzled row
  bool plain() const { return swizzle == lora_ext::ptx::Swizzle::kNone; }

  uint32_t leading() const {
    if (plain()) return rows * 16;                // the next 8 k
    if (major == Major::kK) return 16;            // not used; CuTe writes the size of a chunk
    return rows * 2 > width() ? 8 * width() : 0;  // the next `width` bytes along m or n
  }
  uint32_t stride() const {
    if (plain()) return rows > 8 ? 128 : 0;     // the next 8 rows
    if (major == Major::kMN) return rows * 16;  // the next 8 k
    return rows > 8 ? 8 * width() : 0;          // the next 8 rows
  }
  // Where the 16 columns of `step` begin.
  uint32_t offset(uint32_t step) const {
    if (major == Major::kMN) return step * rows * 32;
    const uint32_t chunk = 2 * step, chunks_of_atom = width() / 16;
    return chunk / chunks_of_atom * rows * width() + chunk % chunks_of_atom * 16;
  }
};

// For each 16 columns of the tile: CuTe's descriptor equals ours, and each element is at the
// address that we compute.
template <typename Atom, int kRows, gmma::Major kMajor>
void check_descriptor(const std::string& name, emulator::Swizzle swizzle) {
  using T = cute::bfloat16_t;
  constexpr Major kOurMajor = kMajor == gmma::Major::K ? Major::kK : Major::kMN;
  constexpr uint32_t kStart = 3 * 1024;
  const Description described{kOurMajor, lora_ext::ptx::Swizzle(static_cast<int>(swizzle)), kRows};
  Check check(name + ", " + std::to_string(kRows) + " rows");

  const auto layout = cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kRows>, cute::_64>{});
  T* const start = reinterpret_cast<T*>(shared_memory + kStart);
  const auto tile = cute::make_tensor(cute::make_smem_ptr(start), layout);
  for (uint32_t step = 0; step < 4; ++step) {
    const auto operand = cute::local_tile(tile, cute::Shape<cute::Int<kRows>, cute::_16>{},
                                          cute::make_coord(0, step));
    const uint64_t cutes = gmma::make_gmma_desc<kMajor>(operand).desc_;
    const uint64_t ours =
        lora_ext::ptx::matrix_descriptor(kStart + described.offset(step), described.leading(),
                                         described.stride(), described.swizzle);
    check.equal(static_cast<int64_t>(ours), static_cast<int64_t>(cutes));
    const emulator::MatrixDescriptor decoded = emulator::decode_descriptor(cutes);
    check.equal(static_cast<int64_t>(decoded.swizzle), static_cast<int64_t>(swizzle));
    for (uint32_t row = 0; row < kRows; ++row) {
      for (uint32_t k = 0; k < 16; ++k) {
        const void* element = &operand(row, k);
        check.equal(emulator::element_address(decoded, kOurMajor, row, k),
                    static_cast<int64_t>(__cvta_generic_to_shared(element)));
      }
    }
  }
}

template <typename Atom>
void check_k_major(const char* name, emulator::Swizzle swizzle) {
  check_descriptor<Atom, 8, gmma::Major::K>(name, swizzle);
  check_descriptor<Atom, 64, gmma::Major::K>(name, swizzle);
  check_descriptor<Atom, 96, gmma::Major::K>(name, swizzle);
}
template <typename Atom>
void check_mn_major(const char* name, emulator::Swizzle swizzle) {
  check_descriptor<Atom, 64, gmma::Major::MN>(name, swizzle);
  check_descriptor<Atom, 128, gmma::Major::MN>(name, swizzle);
}

void check_fragments() {
  check_mma<cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>>("mma bf16");
  check_mma<cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>>("mma f16");
  check_wgmma_d<8>();
  check_wgmma_d<24>();
  check_wgmma_d<128>();
  check_wgmma_d<256>();
  check_wgmma_a();
}

void check_matrix_moves() {
  check_matrix_move<cute::SM75_U32x1_LDSM_N, true>("ldmatrix.x1", 1, false);
  check_matrix_move<cute::SM75_U32x2_LDSM_N, true>("ldmatrix.x2", 2, false);
  check_matrix_move<cute::SM75_U32x4_LDSM_N, true>("ldmatrix.x4", 4, false);
  check_matrix_move<cute::SM75_U16x2_LDSM_T, true>("ldmatrix.x1.trans", 1, true);
  check_matrix_move<cute::SM75_U16x4_LDSM_T, true>("ldmatrix.x2.trans", 2, true);
  check_matrix_move<cute::SM75_U16x8_LDSM_T, true>("ldmatrix.x4.trans", 4, true);
  check_matrix_move<cute::SM90_U32x1_STSM_N, false>("stmatrix.x1", 1, false);
  check_matrix_move<cute::SM90_U32x2_STSM_N, false>("stmatrix.x2", 2, false);
  check_matrix_move<cute::SM90_U32x4_STSM_N, false>("stmatrix.x4", 4, false);
  check_matrix_move<cute::SM90_U16x2_STSM_T, false>("stmatrix.x1.trans", 1, true);
  check_matrix_move<cute::SM90_U16x4_STSM_T, false>("stmatrix.x2.trans", 2, true);
  check_matrix_move<cute::SM90_U16x8_STSM_T, false>("stmatrix.x4.trans", 4, true);
}

void check_descriptors() {
  using emulator::Swizzle;
  using T = cute::bfloat16_t;
  check_swizzle<0>("no swizzle", Swizzle::kNone);
  check_swizzle<1>("32-byte swizzle", Swizzle::k32);
  check_swizzle<2>("64-byte swizzle", Swizzle::k64);
  check_swizzle<3>("128-byte swizzle", Swizzle::k128);
  check_k_major<gmma::Layout_K_INTER_Atom<T>>("K-major", Swizzle::kNone);
  check_k_major<gmma::Layout_K_SW32_Atom<T>>("K-major 32-byte", Swizzle::k32);
  check_k_major<gmma::Layout_K_SW64_Atom<T>>("K-major 64-byte", Swizzle::k64);
  check_k_major<gmma::Layout_K_SW128_Atom<T>>("K-major 128-byte", Swizzle::k128);
  check_mn_major<gmma::Layout_MN_INTER_Atom<T>>("MN-major", Swizzle::kNone);
  check_mn_major<gmma::Layout_MN_SW32_Atom<T>>("MN-major 32-byte", Swizzle::k32);
  check_mn_major<gmma::Layout_MN_SW64_Atom<T>>("MN-major 64-byte", Swizzle::k64);
  check_mn_major<gmma::Layout_MN_SW128_Atom<T>>("MN-major 128-byte", Swizzle::k128);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--perturb") perturbed_check = argv[2];
  check_fragments();
  check_matrix_moves();
  check_descriptors();
  std::printf("all: %ld comparisons, %ld mismatches\n", total_comparisons, total_mismatches);
  return total_mismatches != 0;
}
