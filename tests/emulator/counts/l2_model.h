// A model of the L2 cache: which of the requested sectors come from DRAM, and what is written back.
//
// 128-byte lines of four 32-byte sectors, least recently used line replaced, write-back. A read
// fetches the missing sector. A write fetches nothing: it marks bytes; a sector that is only partly
// written is completed from DRAM when somebody reads the rest, and costs a whole sector when it is
// written back. The order of requests is the emulator's schedule, and nothing is known of the hash
// that spreads lines over slices, so this compares variants of a kernel; it does not predict a
// counter of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace emulator {

inline constexpr uint32_t kLineBytes = 128;
inline constexpr uint32_t kSectorBytes = 32;
inline constexpr uint32_t kLineSectors = kLineBytes / kSectorBytes;

struct L2Config {
  size_t bytes = size_t{50} << 20;  // one H100
  uint32_t ways = 0;                // lines in a set; 0: fully associative
};

struct L2Traffic {
  uint64_t read_sectors = 0, read_misses = 0;  // sectors that reads touched; that came from DRAM
  uint64_t write_sectors = 0;
  uint64_t dram_read_bytes = 0, dram_write_bytes = 0;
  bool operator==(const L2Traffic&) const = default;
};

class L2Model {
 public:
  explicit L2Model(const L2Config& config = {});
  void read(uint64_t address, size_t bytes);
  void write(uint64_t address, size_t bytes);
  // Writes all dirty sectors back and empties the cache.
  void flush();
  const L2Traffic& traffic() const { return traffic_; }

 private:
  struct Sector {
    bool valid = false;    // all bytes are known
    uint32_t written = 0;  // bytes that DRAM does not have yet
  };
  static constexpr uint32_t kNone = ~0u;
  struct Line {
    uint64_t number = 0;
    Sector sectors[kLineSectors];
    uint32_t newer = kNone, older = kNone;  // of its set
  };
  struct Set {
    uint32_t newest = kNone, oldest = kNone, lines = 0;
  };

  template <class Touch>
  void for_sectors(uint64_t address, size_t bytes, Touch touch);
  Line& line(uint64_t number);
  void unlink(Set& set, uint32_t index);
  void link_newest(Set& set, uint32_t index);
  void write_back(Line& line);

  uint32_t ways_;
  std::vector<Set> sets_;
  std::vector<Line> lines_;
  std::vector<uint32_t> free_;
  std::unordered_map<uint64_t, uint32_t> index_of_;
  L2Traffic traffic_;
};

}  // namespace emulator
