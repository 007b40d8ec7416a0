// What was measured with some numbers of rows, for calls with any.
#pragma once

#include <cstdint>
#include <limits>
#include <map>

namespace lora_ext {

template <typename T>
using ByRows = std::map<int64_t, T>;

// What was measured at the nearest number of rows, as a ratio of at most `most`; null if there is none.
template <typename T>
const T* nearest(const ByRows<T>& measured, int64_t rows,
                 double most = std::numeric_limits<double>::infinity()) {
  const T* found = nullptr;
  const double own = rows < 1 ? 1.0 : static_cast<double>(rows);
  for (auto at = measured.rbegin(); at != measured.rend(); ++at) {
    const auto other = static_cast<double>(at->first);
    const double distance = own < other ? other / own : own / other;
    if (distance <= most) found = &at->second, most = distance;
  }
  return found;
}

}  // namespace lora_ext
