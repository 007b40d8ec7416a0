// How a launch is executed: the adversary's knobs (schedule, completion, residency, seed) and the
// machine's limits. Set the fields of emulator::config() before a launch; a launch reads them once,
// when it starts.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

/// Which warp runs next.
enum class Schedule {
  RunAhead,  ///< a warp runs until it blocks: one warp gets as far ahead as the barriers let it
  Random,    ///< uniformly random, with preemption at every engine call
  Priority,  ///< fixed random priorities with rare changes, as in probabilistic concurrency testing
};

/// When an asynchronous operation (cp.async, TMA, wgmma, remote arrival) takes effect.
enum class Completion {
  Early,   ///< at once
  Late,    ///< only when no thread can run without it
  Random,  ///< at a random time, in random order
};

struct Config {
  uint64_t seed = 1;
  Schedule schedule = Schedule::Random;
  Completion completion = Completion::Late;
  uint32_t resident_clusters = 0;  ///< clusters on the machine at a time; 0: all of them
  bool poison = true;  ///< fresh shared memory and destinations in flight hold NaN bytes
  bool freeze = true;  ///< now and then one warpgroup is not scheduled for a while
  size_t stack_bytes = 64 * 1024;  ///< of one fiber (doubled under AddressSanitizer)
  double watchdog_seconds =
      60;  ///< processor time of one launch; a stopped debugger does not count
  uint32_t shared_limit = 227 * 1024;     ///< bytes of shared memory a block can have (sm_90)
  uint32_t registers_per_sm = 64 * 1024;  ///< 32-bit registers that one block can have
};

/// The configuration that the next launch uses.
Config& config();

const char* name_of(Schedule schedule);
const char* name_of(Completion completion);

/// Bytes of poison: a NaN as fp32, bf16 and fp16, and a conspicuous integer.
inline constexpr unsigned char kPoisonByte = 0xFF;

/// xorshift64: small, fast, and the same everywhere, so that a seed replays a run.
class Rng {
 public:
  explicit Rng(uint64_t seed = 1) { reseed(seed); }
  void reseed(uint64_t seed) {
    state_ = seed * 0x9E3779B97F4A7C15ull ^ 0xD1B54A32D192ED03ull;
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 4; ++i) (*this)();
  }
  uint32_t operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  /// A number in [0, bound); bound > 0.
  uint32_t below(uint32_t bound) {
    return static_cast<uint32_t>((static_cast<uint64_t>((*this)()) * bound) >> 32);
  }
  bool one_in(uint32_t odds) { return below(odds) == 0; }

 private:
  uint64_t state_ = 1;
};

}  // namespace emulator
