// As trace.cpp, for few rows by lora_decode:
//
//     trace_decode M K N RANK ADAPTERS [L2_MIB]     one line of JSON: requests by what is asked for
//
// Rows take adapters in turn. With one, the plan is that of a single adapter. Blocks have
// the work that plan/decode_shares.h gives them, and the last to come to a tile finishes it.
#include <cstdlib>

#include "benchmarks/traffic/trace_memory.h"
#include "plan/decode_plan.h"
#include "plan/decode_shares.h"
#include "plan/grouped_plan.h"

namespace {

namespace plan = lora_ext::plan;
using namespace trace;

struct Shape {
  int64_t m, k, n, rank, adapters;
};

plan::Plan planned(const Shape& s) {
  const plan::Problem one{.m = s.m, .n = s.n, .k = s.k, .rank = s.rank};
  if (s.adapters == 1) return plan::forward(kCard, one, {plan::Choice::kKernel});
  const plan::GroupedProblem many{one, s.adapters, true};
  return plan::grouped_forward(kCard, many, {plan::Choice::kKernel}).one;
}

class Decode {
 public:
  Decode(const Shape& shape, size_t l2)
      : s_(shape), memory_(l2), plan_(planned(shape)), tile_(plan::decode_tile_for(shape.m)) {
    if (!plan_.is_decode()) emulator::fail(emulator::ErrorKind{}, "no plan for so many rows");
    const int64_t elements = tile_.rows * tile_.batch;
    x_ = memory_.allocate(s_.m, s_.k, 2), w_ = memory_.allocate(s_.n, s_.k, 2);
    a_ = memory_.allocate(s_.adapters * rank_rows(), s_.k, 2);
    b_ = memory_.allocate(s_.n * s_.adapters, s_.rank, 2);
    y_ = memory_.allocate(s_.m, s_.n, 2), t_ = memory_.allocate(s_.m, plan_.decode.width, 2);
    s_out_ = memory_.allocate(s_.m, s_.rank, 4);
    sums_ = memory_.allocate(shares_.slots(), elements, 4);
    s_sums_ = memory_.allocate(shares_.s_slots(), elements, 4);
    arrived_.resize(static_cast<size_t>(tiles())),
        s_arrived_.resize(static_cast<size_t>(s_tiles()));
  }

  void trace() {
    const int64_t blocks = plan_.gemm.blocks;
    run(blocks, blocks, [&](int64_t block) -> Block {
      const auto steps = steps_of(block);
      return [this, block, steps](int64_t at) {
        if (at >= static_cast<int64_t>(steps.size())) return false;
        make(block, steps[static_cast<size_t>(at)]);
        return true;
      };
    });
  }

  void report() {
    const int64_t once = w_.bytes() + x_.bytes() + y_.bytes() + s_out_.bytes() +
                         2 * s_.adapters * s_.rank * (s_.k + s_.n);
    const uint64_t dram = memory_.dram();
    std::printf(
        "{\"w\": %llu, \"x\": %llu, \"factors\": %llu, \"sums\": %llu, \"results\": %llu, "
        "\"dram\": %llu, \"w_bytes\": %lld, \"once\": %lld, \"blocks\": %d}\n",
        count(kW), count(kX), count(kFactors), count(kSums), count(kResults),
        static_cast<unsigned long long>(dram), static_cast<long long>(w_.bytes()),
        static_cast<long long>(once), plan_.gemm.blocks);
  }

 private:
  enum Kind { kW, kX, kFactors, kSums, kResults, kKinds };
  struct Step {
    bool of_s;
    int64_t tile, step;
    bool last;  // of the block's part of the tile
  };

  int64_t rank_rows() const { return blocks_of(s_.rank, 16) * 16; }
  int64_t tiles() const { return plan_.decode.tiles; }
  int64_t s_tiles() const { return plan_.decode.s_tiles; }
  int64_t first_unit(int64_t block) const { return shares_.first_unit(static_cast<int>(block)); }
  unsigned long long count(Kind kind) const { return requested_[kind]; }

  template <class Touch>
  void ask(Kind kind, const Touch& touch) {
    const uint64_t before = memory_.requested();
    touch();
    requested_[kind] += memory_.requested() - before;
  }

  std::vector<Step> steps_of(int64_t block) const {
    std::vector<Step> steps;
    // Steps of each tile, of which the last of a run ends a part.
    const auto add = [&](bool of_s, int64_t tile, int64_t step, bool last) {
      if (step < shares_.steps) steps.push_back({of_s, tile, step, false});
      if (!steps.empty() && (last || step >= shares_.steps - 1)) steps.back().last = true;
    };
    const int at = static_cast<int>(block), chunks = shares_.chunks();
    const int end_chunk = shares_.first_chunk(at + 1), end = shares_.first_unit(at + 1);
    for (int chunk = shares_.first_chunk(at); chunk < end_chunk; ++chunk) {
      const int step = chunk % chunks * shares_.kChunk;
      add(true, chunk / chunks, step, false);
      add(true, chunk / chunks, step + 1, chunk == end_chunk - 1);
    }
    for (int unit = shares_.first_unit(at); unit < end; ++unit)
      add(false, unit / shares_.steps, unit % shares_.steps, unit == end - 1);
    return steps;
  }
  // The blocks with a part of a tile of Y.
  int64_t parts_of(int64_t tile) const {
    int64_t parts = 0;
    for (int64_t block = 0; block < plan_.gemm.blocks; ++block) parts += has_part(tile, block);
    return parts;
  }
  bool has_part(int64_t tile, int64_t block) const {
    return first_unit(block) < (tile + 1) * shares_.steps &&
           first_unit(block + 1) > tile * shares_.steps;
  }

  void make(int64_t block, const Step& step) {
    const int64_t k = step.step * kStep, row = step.tile * tile_.rows;
    ask(kX, [&] { memory_.read(x_, 0, s_.m, k, kStep); });
    if (step.of_s) {
      ask(kFactors, [&] { read_a(row, k); });
    } else {
      ask(kW, [&] { memory_.read(w_, row, tile_.rows, k, kStep); });
    }
    if (!step.last) return;
    step.of_s ? part_of_s(block, step) : part_of_y(block, step.tile);
  }
  // Of each 16 rows those within the rank.
  void read_a(int64_t row, int64_t k) {
    for (int64_t first = row; first < row + tile_.rows && first < a_.rows; first += 16) {
      const int64_t inside = first % rank_rows();
      memory_.read(a_, first, std::min<int64_t>(16, s_.rank - inside), k, kStep);
    }
  }
  int64_t rows_of_s(int64_t tile) const {
    return std::min(tile_.rows, a_.rows - tile * tile_.rows);
  }
  void part_of_s(int64_t block, const Step& step) {
    const int tile = static_cast<int>(step.tile),
              chunk = static_cast<int>(step.step / shares_.kChunk);
    const int64_t elements = rows_of_s(tile) * tile_.batch;
    const plan::DecodeShares::Parts parts = shares_.s_parts(tile);
    const int slot = shares_.s_slot(tile, chunk, static_cast<int>(block));
    ask(kSums, [&] { memory_.write(s_sums_, slot, 1, 0, elements); });
    if (++s_arrived_[static_cast<size_t>(tile)] < parts.count) return;
    ask(kSums, [&] {
      memory_.read(s_sums_, parts.slot, parts.count, 0, elements);
      memory_.write(t_, 0, s_.m, 0, t_.columns);
    });
    ask(kResults, [&] { memory_.write(s_out_, 0, s_.m, 0, s_.rank); });
    if (++s_done_ < s_tiles()) return;
    for (int64_t tile = 0; tile < tiles(); ++tile) come(tile);
  }
  void part_of_y(int64_t block, int64_t tile) {
    ask(kSums, [&] { memory_.write(sums_, tile + block, 1, 0, sums_.columns); });
    come(tile);
  }
  void come(int64_t tile) {
    if (++arrived_[static_cast<size_t>(tile)] < parts_of(tile) + (s_tiles() > 0)) return;
    for (int64_t block = 0; block < plan_.gemm.blocks; ++block)
      if (has_part(tile, block))
        ask(kSums, [&] { memory_.read(sums_, tile + block, 1, 0, sums_.columns); });
    const int64_t row = tile * tile_.rows;
    ask(kSums, [&] { memory_.read(t_, 0, s_.m, 0, t_.columns); });
    for (int64_t adapter = 0; adapter < s_.adapters; ++adapter)
      ask(kFactors, [&] { memory_.read(b_, adapter * s_.n + row, tile_.rows, 0, b_.columns); });
    ask(kResults, [&] { memory_.write(y_, 0, s_.m, row, tile_.rows); });
  }

  const Shape s_;
  Memory memory_;
  const plan::Plan plan_;
  const plan::DecodeTile& tile_;
  const plan::DecodeShares shares_{static_cast<int>(plan_.decode.tiles),
                                   static_cast<int>(plan_.decode.s_tiles),
                                   static_cast<int>(blocks_of(s_.k, kStep)), plan_.gemm.blocks};
  Matrix x_{}, w_{}, a_{}, b_{}, y_{}, t_{}, s_out_{}, sums_{}, s_sums_{};
  std::vector<int64_t> arrived_, s_arrived_;
  int64_t s_done_ = 0;
  uint64_t requested_[kKinds] = {};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: trace_decode M K N RANK ADAPTERS [L2_MIB]\n");
    return 2;
  }
  const Shape shape{std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                    std::atoll(argv[4]), std::atoll(argv[5])};
  const size_t l2 = (argc > 6 ? std::strtoull(argv[6], nullptr, 10) : 40) << 20;
  Decode decode(shape, l2);
  decode.trace();
  decode.report();
}
