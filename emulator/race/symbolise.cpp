// Symbolises with addr2line, and picks the frame that a reader wants; see symbolise.h.
#include "emulator/race/symbolise.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string_view>

#include "emulator/machine/fail.h"

namespace emulator::race {
namespace {

struct Position {
  std::string function, file_and_line;
};

// For each call the position, and those of the calls that were inlined around it, innermost first.
using Positions = std::map<const void*, std::vector<Position>>;

// The call itself lies before the address to which it returns.
uintptr_t offset_of_call(const void* return_address, const Dl_info& info) {
  return reinterpret_cast<uintptr_t>(return_address) - reinterpret_cast<uintptr_t>(info.dli_fbase) -
         1;
}

// Asks addr2line for all frames at once: starting it takes a tenth of a second.
void look_up(const std::vector<const void*>& frames, Positions& known) {
  Dl_info program;
  if (!dladdr(frames[0], &program)) return;
  std::string command = format("addr2line -a -C -f -i -e '%s'", program.dli_fname);
  std::map<uintptr_t, const void*> frame_of;
  for (const void* frame : frames) {
    Dl_info info;
    if (!dladdr(frame, &info) || info.dli_fbase != program.dli_fbase) continue;
    const uintptr_t offset = offset_of_call(frame, info);
    frame_of[offset] = frame;
    known[frame].clear();
    command += format(" 0x%zx", offset);
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  const auto read_line = [&] {
    std::string line;
    for (int c; (c = std::fgetc(pipe)) != EOF && c != '\n';) line.push_back(static_cast<char>(c));
    return line;
  };
  const void* frame = nullptr;
  for (std::string line; !(line = read_line()).empty();) {
    if (line.rfind("0x", 0) == 0) {  // -a: the address before its positions
      frame = frame_of[std::stoull(line, nullptr, 16)];
      continue;
    }
    Position position{line, read_line()};
    const size_t note = position.file_and_line.find(" (discriminator");
    position.file_and_line.resize(std::min(note, position.file_and_line.size()));
    if (position.file_and_line.rfind("??", 0) != 0) known[frame].push_back(std::move(position));
  }
  pclose(pipe);
}

std::string without_folders(const std::string& file_and_line) {
  // Two folders distinguish files; the rest of the path depends on the machine.
  size_t from = file_and_line.size();
  for (int i = 0; i < 3 && from != std::string::npos && from > 0; ++i)
    from = file_and_line.rfind('/', from - 1);
  return from == std::string::npos || from == 0 ? file_and_line : file_and_line.substr(from + 1);
}

// Code of the layer and of csrc/ptx may be between a kernel's line and the hook, as may headers of
// C++ and CUDA.
bool is_kernel_code(const Position& position) {
  const std::string& file = position.file_and_line;
  for (const char* skipped : {"csrc/ptx/", "/include/c++/", "cuda_bf16.h", "cuda_fp16.h",
                              "cuda_bf16.hpp", "cuda_fp16.hpp"})
    if (file.find(skipped) != std::string::npos) return false;
  constexpr std::string_view kLayer = "emulator/";
  const size_t layer = file.rfind(kLayer);
  if (layer == std::string::npos || (layer > 0 && file[layer - 1] != '/')) return true;
  // Kernels live in subfolders of the layer's; its own code does not, but for race/.
  const std::string rest = file.substr(layer + kLayer.size());
  return rest.find('/') != std::string::npos && rest.rfind("race/", 0) != 0;
}

// "specimens::Gemm<float>::load(int) const" without template arguments and parameters, which are
// long for kernels.
std::string short_name(const std::string& function) {
  std::string name;
  int depth = 0;
  for (size_t i = 0; i < function.size(); ++i) {
    const bool anonymous = function.compare(i, 11, "(anonymous ") == 0;
    const bool call_operator = function.compare(i, 2, "()") == 0;
    if (function[i] == '(' && depth == 0 && !anonymous && !call_operator) break;
    if (function[i] == '<') ++depth;
    if (depth == 0) name.push_back(function[i]);
    if (function[i] == '>') --depth;
    if (anonymous && depth == 0) {
      const size_t end = function.find(')', i);
      name += function.substr(i + 1, end - i);
      i = end;
    }
  }
  const size_t result_type = name.rfind(' ', name.find("(anonymous") - 1);
  return result_type == std::string::npos || name.find("operator") != std::string::npos
             ? name
             : name.substr(result_type + 1);
}

}  // namespace

std::string kernel_position(std::vector<const void*> frames) {
  static Positions known;
  frames.erase(std::find(frames.begin(), frames.end(), nullptr), frames.end());
  if (frames.empty()) return "an unknown place";
  if (!std::all_of(frames.begin(), frames.end(), [](auto frame) { return known.contains(frame); }))
    look_up(frames, known);
  for (const void* frame : frames)
    for (const Position& position : known[frame])
      if (is_kernel_code(position))
        return short_name(position.function) + " at " + without_folders(position.file_and_line);
  Dl_info info;
  if (!dladdr(frames[0], &info)) return format("%p", frames[0]);
  return format("%s+0x%zx", without_folders(info.dli_fname).c_str(),
                offset_of_call(frames[0], info));
}

}  // namespace emulator::race
