// Distributes pieces of unequal work over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace lora_ext::cpu {

// What a thread's start costs in multiply-adds, about 5 us; tests set less.
inline std::atomic<int64_t> min_work{1 << 18};

// The number of threads that an amount of work, in multiply-adds, is worth.
inline int64_t threads_for(int64_t work) {
  return std::clamp<int64_t>(work / min_work, 1, at::get_num_threads());
}

// The work of all pieces, each of which has a field `work`.
template <class Pieces>
int64_t work_of(const Pieces& pieces) {
  int64_t work = 0;
  for (const auto& piece : pieces) work += piece.work;
  return work;
}

// Consecutive pieces for each thread: those of thread t begin at [t] and end at [t + 1]. Each thread
// gets about the same work.
template <class Pieces>
std::vector<size_t> shares_of(const Pieces& pieces, int64_t threads) {
  const int64_t total = work_of(pieces);
  std::vector<size_t> firsts(static_cast<size_t>(threads) + 1, pieces.size());
  firsts[0] = 0;
  int64_t before = 0, thread = 1;
  for (size_t i = 0; i < pieces.size(); ++i) {
    // A piece goes to the thread whose share of the work contains the middle of the piece.
    while (thread < threads && 2 * before + pieces[i].work > 2 * (total / threads) * thread) {
      firsts[static_cast<size_t>(thread++)] = i;
    }
    before += pieces[i].work;
  }
  return firsts;
}

// Calls run(thread, piece) for every piece. The result of a piece does not depend on the thread that
// runs it.
template <class Pieces, class Run>
void run_pieces(const Pieces& pieces, int64_t threads, const Run& run) {
  if (threads == 1) {
    for (const auto& piece : pieces) run(int64_t{0}, piece);
    return;
  }
  const std::vector<size_t> firsts = shares_of(pieces, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (auto t = static_cast<size_t>(begin); t < static_cast<size_t>(end); ++t) {
      for (size_t i = firsts[t]; i < firsts[t + 1]; ++i) {
        run(static_cast<int64_t>(t), pieces[i]);
      }
    }
  });
}

}  // namespace lora_ext::cpu
