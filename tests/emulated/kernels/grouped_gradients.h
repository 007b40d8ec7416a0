// The gradients of many adapters in global memory, for the kernels' host programs: as their factors
// lie, in a pool or in a list, with room between that nobody may write.
#pragma once
#include <memory>
#include <vector>

#include "emulated/kernels/grouped_rows.h"
#include "emulated/kernels/reference.h"

namespace kernels {

template <class F>
class GroupedGradients {
 public:
  using Entry = lora_ext::kernel::LoraGroupedEntry;

  GroupedGradients(const GroupedRows& rows, int n, int k, bool pooled)
      : rows_(rows),
        n_(n),
        k_(k),
        pooled_(pooled),
        a_pitch_(k + kBetween),
        b_pitch_(rows.most_rank + kBetween),
        a_stride_(int64_t{rows.most_rank} * a_pitch_ + kBetween),
        b_stride_(int64_t{n} * b_pitch_ + kBetween),
        ranks_(rows.ranks, "ranks of gradients"),
        a_(static_cast<size_t>(rows.groups * a_stride_), "dlora_a"),
        b_(static_cast<size_t>(rows.groups * b_stride_), "dlora_b") {
    a_.fill(unwritten()), b_.fill(unwritten());
    std::vector<Entry> list;
    for (int g = 0; g < rows.groups; ++g)
      list.push_back({a_.data() + g * a_stride_, b_.data() + g * b_stride_, a_pitch_, b_pitch_,
                      rows.ranks[g]});
    entries_ = std::make_unique<emulator::GlobalBuffer<Entry>>(list, "entries of gradients");
  }

  lora_ext::kernel::LoraGroupedFactors parameters() {
    if (!pooled_) return {entries_->data(), nullptr, nullptr, 0, 0, 0, 0, nullptr};
    return {nullptr, a_.data(), b_.data(), a_stride_, b_stride_, a_pitch_, b_pitch_, ranks_.data()};
  }

  const Entry* list() const { return pooled_ ? nullptr : entries_->data(); }
  bool same_bits(const GroupedGradients& other) const {
    const auto same = [](const emulator::GlobalBuffer<F>& a, const emulator::GlobalBuffer<F>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(F)) == 0;
    };
    return same(a_, other.a_) && same(b_, other.b_);
  }

  // expected(adapter, r, column) gives a sum of the wanted ones, exact or with its error. "" or
  // what differs.
  template <class Expected>
  std::string compare_a(bool wanted, bool exact, const Expected& expected) const {
    return compare(
        "dlora_a", a_, a_stride_, rows_.most_rank, a_pitch_,
        [&](int g, int r, int c) {
          return where(wanted, g, r, c, k_, [&] { return expected(g, r, c); });
        },
        exact);
  }
  template <class Expected>
  std::string compare_b(bool wanted, bool exact, const Expected& expected) const {
    return compare(
        "dlora_b", b_, b_stride_, n_, b_pitch_,
        [&](int g, int c, int r) {
          return where(wanted, g, r, r < rows_.most_rank ? c : n_, n_,
                       [&] { return expected(g, r, c); });
        },
        exact);
  }

 private:
  static constexpr int kBetween = 3;
  static F unwritten() { return from_double<F>(-12345); }

  // What an element must be: that sum, zero, or what was there.
  template <class Sum>
  Bounded where(bool wanted, int g, int r, int c, int columns, const Sum& sum) const {
    Bounded zero, kept;
    kept.value = to_double(unwritten());
    if (!wanted || c >= columns) return kept;
    if (r >= rows_.rank(g)) return pooled_ ? zero : kept;
    return sum();
  }
  template <class Expected>
  std::string compare(const char* name, const emulator::GlobalBuffer<F>& got, int64_t stride,
                      int lines, int64_t pitch, const Expected& expected, bool exact) const {
    for (int g = 0; g < rows_.groups; ++g) {
      for (int line = 0; line < lines; ++line) {
        for (int i = 0; i < pitch; ++i) {
          const Bounded sum = expected(g, line, i);
          const double value = exact ? to_double(from_double<F>(sum.value)) : sum.value;
          const double tolerance =
              exact ? 0 : sum.error() + rounding_error<F>(std::fabs(value) + sum.error());
          const auto at = static_cast<size_t>(g * stride + line * pitch + i);
          const std::string difference =
              kernels::compare(name, line, i, got[at], value, sum.terms == 0 ? 0 : tolerance);
          if (!difference.empty())
            return emulator::format("adapter %d of rank %d: ", g, rows_.rank(g)) + difference;
        }
      }
    }
    return "";
  }

  const GroupedRows& rows_;
  int n_, k_;
  bool pooled_;
  int64_t a_pitch_, b_pitch_, a_stride_, b_stride_;
  emulator::GlobalBuffer<int> ranks_;
  emulator::GlobalBuffer<F> a_, b_;
  std::unique_ptr<emulator::GlobalBuffer<Entry>> entries_;
};

}  // namespace kernels
