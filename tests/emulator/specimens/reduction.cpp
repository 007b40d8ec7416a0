// Runs the reductions of reduction.h.
#include "emulator/specimens/reduction.h"

#include "emulator/emulator.h"
#include "emulator/specimens/driver.h"
#include "emulator/specimens/reference.h"

namespace specimens {

extern template void ordered_sum<emulator::PlantedFault>(OrderedSumParams);
extern template void sum_and_max<emulator::PlantedFault>(SumAndMaxParams);

namespace {

using emulator::GlobalBuffer;
using emulator::PlantedFault;

std::string run_ordered_sum(const Case& run) {
  std::mt19937_64 random(run.seed);
  const Numbers numbers = random() % 2 ? Numbers::Integers : Numbers::Reals;
  const int count = run.size.m, parts = ordered_sum_parts(count);
  const GlobalBuffer<float> x(random_matrix<float>(1, count, count, numbers, random).values, "x");
  Bounded sum;
  for (const float value : x.to_vector()) sum.add(value);

  float first = 0;
  for (int round = 0; round < 2; ++round) {  // under another interleaving the bits are the same
    GlobalBuffer<float> running(parts, "running");
    GlobalBuffer<uint32_t> ready(std::vector<uint32_t>(parts), "ready"),
        next(std::vector<uint32_t>(1), "next");
    emulator::config().seed = run.seed + static_cast<uint64_t>(round) * 1000;
    emulator::Stream stream;
    stream.launch({.grid = dim3(parts),
                   .block = dim3(kReductionThreads),
                   .shared_bytes = sizeof(OrderedSumShared)},
                  ordered_sum<PlantedFault>,
                  OrderedSumParams{x.data(), count, running.data(), ready.data(), next.data()});
    run_timed(stream);
    const float result = running[parts - 1];
    if (round == 0) first = result;
    const std::string difference =
        compare("sum", 0, 0, result, sum.value, numbers == Numbers::Integers ? 0 : sum.error());
    if (!difference.empty()) return difference;
    if (result != first) return "the sum's bits differ between two interleavings";
  }
  return "";
}

std::string run_sum_and_max(const Case& run) {
  std::mt19937_64 random(run.seed);
  const int count = run.size.m, blocks = 1 + static_cast<int>(random() % 40);
  std::vector<uint32_t> values(count);
  SumAndMax expected{0, 0};
  for (uint32_t& value : values) {
    value = static_cast<uint32_t>(random());
    expected.sum += value;
    expected.max = std::max(expected.max, value);
  }
  const GlobalBuffer<uint32_t> x(values, "x");
  GlobalBuffer<SumAndMax> partials(blocks, "partials"), result(1, "result");
  GlobalBuffer<uint32_t> ticket(std::vector<uint32_t>(1), "ticket");
  emulator::Stream stream;
  stream.launch({.grid = dim3(blocks),
                 .block = dim3(kReductionThreads),
                 .shared_bytes = sizeof(SumAndMaxShared)},
                sum_and_max<PlantedFault>,
                SumAndMaxParams{x.data(), count, partials.data(), result.data(), ticket.data()});
  run_timed(stream);
  std::string difference = compare("sum", 0, 0, double(result[0].sum), expected.sum, 0);
  if (difference.empty()) difference = compare("max", 0, 0, double(result[0].max), expected.max, 0);
  if (difference.empty()) difference = compare("ticket", 0, 0, double(ticket[0]), 0, 0);
  return difference;
}

}  // namespace
}  // namespace specimens

int main(int argc, char** argv) {
  using namespace specimens;
  return specimen_main(
      argc, argv,
      {.name = "reduction",
       .sizes =
           {{"one", 1, 1, 1}, {"odd", 333, 1, 1}, {"parts", 4096, 1, 1}, {"odd_parts", 5003, 1, 1}},
       .variants = {"ordered_sum", "sum_and_max"},
       .run =
           [](const Case& run) {
             return run.variant == "ordered_sum" ? run_ordered_sum(run) : run_sum_and_max(run);
           },
       .flops = [](const Size& size) { return double(size.m); }});
}
