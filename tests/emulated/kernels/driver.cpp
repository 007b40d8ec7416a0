#include "emulated/kernels/driver.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <stdexcept>

#include "emulated/mutants/known_fault.h"
#include "emulator/fault.h"

namespace kernels {
namespace {

using emulator::Completion;
using emulator::Config;
using emulator::Schedule;

constexpr Schedule kSchedules[] = {Schedule::RunAhead, Schedule::Random, Schedule::Priority};
constexpr Completion kCompletions[] = {Completion::Early, Completion::Late, Completion::Random};

double kernel_seconds = 0;
std::vector<std::string> facts;

using Arguments = std::map<std::string, std::string>;

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (!name.starts_with("--") || i + 1 == argc)
      throw std::invalid_argument("expected --name value, but got " + name +
                                  "; driver.h lists the arguments");
    arguments[name] = argv[++i];
  }
  return arguments;
}

// The element whose name was given, or else the one that `number` selects.
template <class Range, class NameOf>
auto choose(const Arguments& arguments, const char* argument, const Range& range, uint64_t number,
            NameOf name_of) {
  const auto given = arguments.find(argument);
  if (given == arguments.end()) return range[number % std::size(range)];
  std::string names;
  for (const auto& element : range) {
    if (given->second == name_of(element)) return element;
    names += std::string(" ") + name_of(element);
  }
  throw std::invalid_argument(std::string(argument) + " is one of" + names + ", but got " +
                              given->second);
}

uint64_t mix(uint64_t seed) {  // splitmix64
  seed += 0x9E3779B97F4A7C15ull;
  seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9ull;
  seed = (seed ^ seed >> 27) * 0x94D049BB133111EBull;
  return seed ^ seed >> 31;
}

Case draw_case(const Arguments& arguments, uint64_t seed) {
  // Nine seeds in a row see every schedule with every completion; the rest is drawn.
  const auto name_of = [](auto value) { return emulator::name_of(value); };
  Config& config = emulator::config();
  config.seed = seed;
  config.schedule = choose(arguments, "--schedule", kSchedules, seed, name_of);
  config.completion = choose(arguments, "--completion", kCompletions, seed / 3, name_of);
  const uint64_t bits = mix(seed);
  config.resident_clusters = static_cast<uint32_t>(
      arguments.contains("--resident") ? std::stoul(arguments.at("--resident")) : bits % 3);
  if (arguments.contains("--watchdog"))
    config.watchdog_seconds = std::stod(arguments.at("--watchdog"));
#ifdef EVERY_INSTANCE  // each size of each of them once, on both architectures, in mixed order
  const uint64_t sizes = program.sizes.size(), of_variant = seed / 2;
  const uint64_t of_size = of_variant + of_variant / std::lcm(sizes, program.variants.size());
#else
  const uint64_t of_size = bits >> 8, of_variant = bits >> 16;
#endif
  return {seed,
          choose(arguments, "--size", program.sizes, of_size,
                 [](const Size& size) { return size.name; }),
          choose(arguments, "--variant", program.variants, of_variant, [](const Variant& variant) {
            return variant.name;
          }).name};
}

std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    const bool control = static_cast<unsigned char>(c) < 0x20;
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += control ? emulator::format("\\u%04x", c) : std::string(1, c);
  }
  return quoted + '"';
}

std::string json(const std::vector<std::string>& texts) {
  std::string list;
  for (const std::string& text : texts) list += (list.empty() ? "" : ", ") + json(text);
  return "[" + list + "]";
}

// One run as a JSON line; returns whether it was clean. The line begins before the run does, so
// that a sanitizer that ends the program leaves behind which run it was.
bool run_case(const Case& run, const std::string& fault) {
  const Config& config = emulator::config();
  std::printf(
      "{\"program\": %s, \"seed\": %llu, \"size\": %s, \"variant\": %s, \"schedule\": %s, "
      "\"completion\": %s, \"resident\": %u, \"fault\": %s",
      json(program.name).c_str(), static_cast<unsigned long long>(run.seed),
      json(run.size.name).c_str(), json(run.variant).c_str(),
      json(emulator::name_of(config.schedule)).c_str(),
      json(emulator::name_of(config.completion)).c_str(), config.resident_clusters,
      json(fault).c_str());
  std::fflush(stdout);
  emulated::plant_known_fault(fault.c_str());
  std::string outcome = "clean", message;
  kernel_seconds = 0;
  facts.clear();
  emulator::reset_counters();
  try {
    for (const Variant& variant : program.variants)
      if (run.variant == variant.name) variant.run(run);
  } catch (const Difference& difference) {
    outcome = "result";
    message = difference.what();
  } catch (const emulator::Error& error) {
    outcome = emulator::name_of(error.kind);
    message = error.what();
  }
  std::printf(
      ", \"outcome\": %s, \"message\": %s, \"reached\": %llu, "
      "\"early_blocks\": %llu, \"seconds\": %.6f, \"flops\": %.0f, \"facts\": %s}\n",
      json(outcome).c_str(), json(message).c_str(),
      static_cast<unsigned long long>(emulator::planted_fault_reached()),
      static_cast<unsigned long long>(emulator::counters().early_blocks), kernel_seconds,
      2.0 * run.size.m * run.size.n * run.size.k, json(facts).c_str());
  std::fflush(stdout);
  return outcome == "clean";
}

}  // namespace

void run_timed(emulator::Stream& stream) {
  const auto start = std::chrono::steady_clock::now();
  stream.synchronize();
  kernel_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void tell(const std::string& fact) { facts.push_back(fact); }

void limit_residency() {
  uint32_t& resident = emulator::config().resident_clusters;
  if (resident == 0) resident = 24;
}

}  // namespace kernels

int main(int argc, char** argv) try {
  using namespace kernels;
  const Arguments arguments = parse(argc, argv);
  uint64_t first = 1, last = 1;
  if (arguments.contains("--seed")) first = last = std::stoull(arguments.at("--seed"));
  if (arguments.contains("--seeds")) {
    const std::string& range = arguments.at("--seeds");
    first = std::stoull(range);
    last = std::stoull(range.substr(range.find(':') + 1)) - 1;
  }
  const std::string fault = arguments.contains("--fault") ? arguments.at("--fault") : "";
  for (uint64_t seed = first; seed <= last; ++seed) {
    if (!run_case(draw_case(arguments, seed), fault)) return 1;
  }
  return 0;
} catch (const std::invalid_argument& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
