// The factors of many adapters in global memory, for the kernels' host programs: in a pool or in a
// list, with NaN wherever no adapter's own rank reaches, and in the factors of adapters that nobody
// takes.
#pragma once
#include <memory>
#include <vector>

#include "emulated/kernels/grouped_rows.h"
#include "emulated/kernels/operand.h"

namespace kernels {

template <class F>
class GroupedFactors {
 public:
  using Entry = lora_ext::kernel::LoraGroupedEntry;

  // A [rank, k], B [n, rank]. Rows of factors in a list begin anywhere, but for one adapter in two.
  GroupedFactors(const GroupedRows& rows, int n, int k, Numbers numbers, std::mt19937_64& random,
                 double size = 1)
      : rows_(rows), n_(n), k_(k), pooled_(random() % 2), ranks_(rows.ranks, "ranks") {
    const bool whole = random() % 2;
    a_pitch_ = whole ? padded(k) : k + 3, b_pitch_ = rows.most_rank + (whole ? 8 : 1);
    if (whole) b_pitch_ = padded(b_pitch_);
    a_stride_ = int64_t{rows.most_rank} * a_pitch_ + (whole ? 8 : 1);
    b_stride_ = int64_t{n} * b_pitch_ + (whole ? 8 : 1);
    const auto groups = static_cast<int64_t>(rows.groups);
    a_ = std::make_unique<Buffer>(static_cast<size_t>(groups * a_stride_), "lora_a");
    b_ = std::make_unique<Buffer>(static_cast<size_t>(groups * b_stride_), "lora_b");
    a_->fill(from_double<F>(NAN)), b_->fill(from_double<F>(NAN));
    std::vector<Entry> list;
    for (int g = 0; g < rows.groups; ++g) {
      const bool taken =
          std::find(rows.adapter_of.begin(), rows.adapter_of.end(), g) != rows.adapter_of.end();
      // Not all of a pool is a stride's multiple, nor all of a list 16 bytes.
      Entry entry{a_->data() + g * a_stride_, b_->data() + g * b_stride_, a_pitch_, b_pitch_,
                  rows.ranks[g]};
      const int rank = rows.rank(g);
      a_of_.push_back(random_matrix<F>(rank, k, k, numbers, random));
      b_of_.push_back(random_matrix<F>(n, rank, std::max(1, rank), numbers, random));
      if (!pooled_ && random() % 2) entry.b_pitch = rank;  // rows one behind the other
      for (int r = 0; r < rank; ++r)
        for (int c = 0; c < k; ++c) {
          F& value = a_of_[g].at(r, c);
          if (numbers == Numbers::Reals) value = from_double<F>(to_double(value) * size);
          if (taken) static_cast<F*>(entry.a)[r * entry.a_pitch + c] = value;
        }
      for (int c = 0; c < n; ++c)
        for (int r = 0; r < rank; ++r) {
          F& value = b_of_[g].at(c, r);
          if (numbers == Numbers::Reals) value = from_double<F>(to_double(value) * size);
          if (taken) static_cast<F*>(entry.b)[c * entry.b_pitch + r] = value;
        }
      list.push_back(entry);
    }
    entries_ = std::make_unique<emulator::GlobalBuffer<Entry>>(list, "entries");
  }

  lora_ext::kernel::LoraGroupedFactors parameters() const {
    if (!pooled_) return {entries_->data(), nullptr, nullptr, 0, 0, 0, 0, nullptr};
    return {nullptr,   a_->data(), b_->data(), a_stride_,
            b_stride_, a_pitch_,   b_pitch_,   ranks_.data()};
  }
  // Puts NaN in all of an adapter's A and B.
  void spoil(int g) {
    for (int r = 0; r < rows_.rank(g); ++r)
      for (int c = 0; c < k_; ++c)
        static_cast<F*>(of(g).a)[r * of(g).a_pitch + c] = from_double<F>(NAN);
    for (int c = 0; c < n_; ++c)
      for (int r = 0; r < rows_.rank(g); ++r)
        static_cast<F*>(of(g).b)[c * of(g).b_pitch + r] = from_double<F>(NAN);
  }
  // On the host; null for a pool.
  const Entry* list() const { return pooled_ ? nullptr : entries_->data(); }
  // Whether an adapter's A and B lie in 16-byte chunks.
  bool a_in_chunks(int g) const { return in_chunks(of(g).a, of(g).a_pitch); }
  bool b_in_chunks(int g) const { return in_chunks(of(g).b, of(g).b_pitch); }
  double a(int adapter, int r, int column) const { return a_of_[adapter](r, column); }
  double b(int adapter, int row, int r) const { return b_of_[adapter](row, r); }

 private:
  using Buffer = emulator::GlobalBuffer<F>;
  const Entry& of(int g) const { return (*entries_)[g]; }
  static bool in_chunks(const void* data, int64_t pitch) {
    return sizeof(F) == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 8 == 0;
  }
  const GroupedRows& rows_;
  int n_, k_;
  bool pooled_;
  int64_t a_pitch_ = 0, b_pitch_ = 0, a_stride_ = 0, b_stride_ = 0;
  emulator::GlobalBuffer<int> ranks_;
  std::unique_ptr<Buffer> a_, b_;
  std::vector<Matrix<F>> a_of_, b_of_;
  std::unique_ptr<emulator::GlobalBuffer<Entry>> entries_;
};

// Of floats, hi and lo as the kernels keep them.
template <class T, class F>
double half_of(double value, bool lo) {
  if constexpr (!std::is_same_v<F, float>) return lo ? 0 : value;
  const float hi = to_double(lora_ext::kernel::high_half<T>(static_cast<float>(value)));
  if (!lo) return hi;
  return to_double(lora_ext::kernel::low_half<T>(static_cast<float>(value))) /
         lora_ext::kernel::kLoScale<T>;
}
template <class T, class F>
double as_halves(double value) {
  return half_of<T, F>(value, false) + half_of<T, F>(value, true);
}

}  // namespace kernels
