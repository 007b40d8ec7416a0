// Golden vectors in memory and as a file: cases of named arrays. vectors.py describes the file and
// reads it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace conformance {

// The case that runs is one of those to skip.
inline bool skipping = false;

struct Array {
  std::string name, type;  // u8, u16, u32 or f32
  std::vector<size_t> shape;
  std::vector<unsigned char> bytes;
};

// How the outputs of two machines are compared.
//   kExact    bit by bit
//   kProduct  d = c + a b of 16-bit operands and fp32 sums, within the bound of vectors.py
enum class Comparison { kExact, kProduct };

struct Case {
  std::string name;
  std::vector<std::string> functions;  // those of csrc/ptx/ that the case executes
  Comparison comparison;
  int architecture;  // 80, or 90: the lowest that it runs on
  std::vector<Array> inputs, outputs;
};

template <typename T>
const char* type_name() {
  if constexpr (std::is_same_v<T, float>) return "f32";
  return sizeof(T) == 1 ? "u8" : sizeof(T) == 2 ? "u16" : "u32";
}

// The same numbers on every machine: the standard fixes this engine, not its distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint32_t bits() { return static_cast<uint32_t>(engine_() >> 32); }
  uint32_t below(uint32_t bound) { return bits() % bound; }
  float integer(int limit) {
    return static_cast<float>(static_cast<int>(below(2 * limit + 1)) - limit);
  }

  // Any significand; the exponents spread over 2^-3 .. 2^2.
  float number() {
    const uint32_t sign = bits() << 31, exponent = 124 + below(6), fraction = bits() >> 9;
    const uint32_t pattern = sign | exponent << 23 | fraction;
    float value;
    std::memcpy(&value, &pattern, sizeof value);
    return value;
  }

  template <typename T>
  std::vector<T> integers(size_t count, uint32_t bound = 0xFFFFFFFF) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(below(bound));
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

inline std::string base64(const std::vector<unsigned char>& bytes) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t left = bytes.size() - i;
    const uint32_t group =
        bytes[i] << 16 | (left > 1 ? bytes[i + 1] << 8 : 0) | (left > 2 ? bytes[i + 2] : 0);
    text += kDigits[group >> 18];
    text += kDigits[group >> 12 & 63];
    text += left > 1 ? kDigits[group >> 6 & 63] : '=';
    text += left > 2 ? kDigits[group & 63] : '=';
  }
  return text;
}

template <typename Items, typename Print>
std::string list(const Items& items, const char* separator, Print print) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "" : separator) + print(item);
  return text;
}

// 64-bit FNV-1a.
template <typename Bytes>
uint64_t hash(const Bytes& bytes, uint64_t start = 14695981039346656037u) {
  uint64_t value = start;
  for (unsigned char byte : bytes) value = (value ^ byte) * 1099511628211u;
  return value;
}

// Inputs are the same on every machine: a file for the repository has only their hashes.
inline std::string json(const Array& array, bool with_data) {
  const std::string shape = list(array.shape, ", ", [](size_t n) { return std::to_string(n); });
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx",
                static_cast<unsigned long long>(hash(array.bytes)));
  return "{\"name\": \"" + array.name + "\", \"type\": \"" + array.type + "\", \"shape\": [" +
         shape + "], \"hash\": \"" + digits + "\"" +
         (with_data ? ", \"data\": \"" + base64(array.bytes) + "\"" : "") + "}";
}

inline std::string json(const Case& c, bool with_inputs) {
  const auto arrays = [](const std::vector<Array>& all, bool with_data) {
    return list(all, ",\n      ", [=](const Array& array) { return json(array, with_data); });
  };
  const std::string functions =
      list(c.functions, ", ", [](const std::string& name) { return "\"" + name + "\""; });
  return "    {\"name\": \"" + c.name + "\",\n     \"functions\": [" + functions +
         "],\n     \"architecture\": " + std::to_string(c.architecture) +
         ",\n     \"comparison\": \"" + (c.comparison == Comparison::kExact ? "exact" : "product") +
         "\",\n     \"inputs\": [" + arrays(c.inputs, with_inputs) + "],\n     \"outputs\": [" +
         arrays(c.outputs, true) + "]}";
}

// `producer` is a JSON object that says which machine executed the cases; `cases` are JSON, too.
inline std::string json(const std::string& producer, uint64_t seed,
                        const std::vector<std::string>& cases) {
  return "{\n  \"format\": \"lora_ext conformance vectors\",\n  \"version\": 1,\n  \"producer\": " +
         producer + ",\n  \"seed\": " + std::to_string(seed) + ",\n  \"cases\": [\n" +
         list(cases, ",\n", [](const std::string& text) { return text; }) + "\n  ]\n}\n";
}

}  // namespace conformance
