// B of some experts as a pool, [n, N, r], and a pool as B, [N, r E], where the expert is the fastest
// index: a transposition of [r, E] for each of the N rows.
//
// Some rows of B at a time are contiguous memory that stays in the cache while the numbers of one
// expert after the other are copied. In the pool these rows are contiguous for each expert, so that
// whole cache lines are used before the next expert's: experts are often a power of 2 bytes apart,
// and the cache holds few such lines. Where experts and ranks are consecutive, blocks of both are
// transposed in registers: single numbers took 5 times as long in half precision.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/experts.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kGrain = 1 << 14;     // numbers worth a thread's start
constexpr int64_t kBytesOfB = 1 << 15;  // of rows of B that are processed at a time: a core's L1

// out[c * out_pitch + r] = in[r * in_pitch + c] for r and c below kSize. Bits is an unsigned integer
// of the element's size.
template <class Bits>
struct Block {
  static constexpr int64_t kSize = 1;
  static void transpose(const Bits* in, int64_t, Bits* out, int64_t) { *out = *in; }
};

#if defined(__SSE2__)
template <>
struct Block<uint16_t> {
  static constexpr int64_t kSize = 8;
  static void transpose(const uint16_t* in, int64_t in_pitch, uint16_t* out, int64_t out_pitch) {
    __m128i a[8], b[8];
    for (int64_t r = 0; r < 8; ++r) {
      a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + r * in_pitch));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
      b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
      a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
      b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int64_t c = 0; c < 8; ++c) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * out_pitch), b[c]);
    }
  }
};

template <>
struct Block<uint32_t> {
  static constexpr int64_t kSize = 4;
  static void transpose(const uint32_t* in, int64_t in_pitch, uint32_t* out, int64_t out_pitch) {
    __m128i a[4], b[4];
    for (int64_t r = 0; r < 4; ++r) {
      a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + r * in_pitch));
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * i] = _mm_unpacklo_epi32(a[i], a[i + 2]);
      b[2 * i + 1] = _mm_unpackhi_epi32(a[i], a[i + 2]);
    }
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = _mm_unpacklo_epi32(b[i], b[i + 2]);
      a[2 * i + 1] = _mm_unpackhi_epi32(b[i], b[i + 2]);
    }
    for (int64_t c = 0; c < 4; ++c) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * out_pitch), a[c]);
    }
  }
};
#endif

template <class Bits, bool kToPool>
class Copy {
 public:
  Copy(const at::Tensor& out, const at::Tensor& source, const at::Tensor& hit, int64_t experts)
      : number_(hit.const_data_ptr<int64_t>()), count_(hit.numel()), experts_(experts) {
    const at::Tensor& b = kToPool ? source : out;
    rows_ = b.size(0), rank_ = b.size(1) / experts;
    from_ = static_cast<const Bits*>(source.const_data_ptr());
    to_ = static_cast<Bits*>(out.mutable_data_ptr());
  }

  void run() const {
    const int64_t bytes = std::max<int64_t>(1, rank_ * experts_ * sizeof(Bits));
    const int64_t step = std::max<int64_t>(1, kBytesOfB / bytes);
    const int64_t grain = kGrain / std::max<int64_t>(1, count_ * rank_) + 1;
    at::parallel_for(0, rows_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += step) {
        copy_rows(first, std::min(first + step, end));
      }
    });
  }

 private:
  static constexpr int64_t kSize = Block<Bits>::kSize;

  void copy_rows(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < count_;) {
      const bool is_block = are_consecutive(i);
      for (int64_t row = begin; row < end; ++row) copy_row(row, i, is_block);
      i += is_block ? kSize : 1;
    }
  }

  // Whether the experts from the i-th in `hit` on are a block.
  bool are_consecutive(int64_t i) const {
    if (i + kSize > count_) return false;
    for (int64_t c = 1; c < kSize; ++c) {
      if (number_[i + c] != number_[i] + c) return false;
    }
    return true;
  }

  // One row of B, of one expert or of kSize.
  void copy_row(int64_t row, int64_t i, bool is_block) const {
    const int64_t pool_pitch = rows_ * rank_;
    int64_t in_b = row * rank_ * experts_ + number_[i], in_pool = (i * rows_ + row) * rank_;
    int64_t j = 0;
    for (; is_block && j + kSize <= rank_; j += kSize) {
      if (kToPool) {
        Block<Bits>::transpose(from_ + in_b, experts_, to_ + in_pool, pool_pitch);
      } else {
        Block<Bits>::transpose(from_ + in_pool, pool_pitch, to_ + in_b, experts_);
      }
      in_b += kSize * experts_, in_pool += kSize;
    }
    for (; j < rank_; ++j, in_b += experts_, ++in_pool) {
      for (int64_t c = 0; c < (is_block ? kSize : 1); ++c) {
        const int64_t of_b = in_b + c, of_pool = in_pool + c * pool_pitch;
        to_[kToPool ? of_pool : of_b] = from_[kToPool ? of_b : of_pool];
      }
    }
  }

  const int64_t* number_;
  int64_t count_, experts_, rows_, rank_;
  const Bits* from_;
  Bits* to_;
};

template <class Bits>
void copy(const at::Tensor& out, const at::Tensor& source, const at::Tensor& hit, int64_t experts) {
  out.dim() == 3 ? Copy<Bits, true>(out, source, hit, experts).run()
                 : Copy<Bits, false>(out, source, hit, experts).run();
}

}  // namespace

void experts_copy(const at::Tensor& out, const at::Tensor& source, const at::Tensor& hit,
                  int64_t experts) {
  switch (out.element_size()) {
    case sizeof(uint16_t):
      return copy<uint16_t>(out, source, hit, experts);
    case sizeof(uint32_t):
      return copy<uint32_t>(out, source, hit, experts);
    default:
      return copy<uint64_t>(out, source, hit, experts);
  }
}

}  // namespace lora_ext::cpu
