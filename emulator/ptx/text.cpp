#include "emulator/ptx/text.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <set>
#include <sstream>

#include "emulator/machine/fail.h"

namespace emulator::ptx {

void refuse(const std::string& file, int line, const std::string& message) {
  throw Error(ErrorKind::Misuse, file + ":" + std::to_string(line) + ": " + message);
}

namespace {

const std::set<std::string> kSpecial = {
    "%tid.x",   "%tid.y",   "%tid.z",       "%ntid.x",          "%ntid.y",          "%ntid.z",
    "%ctaid.x", "%ctaid.y", "%ctaid.z",     "%nctaid.x",        "%nctaid.y",        "%nctaid.z",
    "%laneid",  "%warpid",  "%clusterid.x", "%cluster_ctarank", "%cluster_nctarank"};
// What changes neither a result nor an order.
const std::set<std::string> kPragmas = {".pragma", ".maxntid", ".minnctapersm", ".loc"};

class Parser {
 public:
  Parser(const std::string& file, const std::string& wanted) : file_(file), wanted_(wanted) {
    std::ifstream stream(file);
    if (!stream) throw Error(ErrorKind::Misuse, file + ": expected PTX, but cannot read the file");
    std::stringstream all;
    all << stream.rdbuf();
    text_ = all.str();
  }

  Module module() {
    while (skip(), at_ < text_.size()) {
      const std::string word = next_word();
      if (word == ".version" || word == ".address_size") {
        next_word();
      } else if (word == ".target") {
        module_.target = next_word();
      } else if (word == ".extern") {
        dynamic_shared();
      } else if (word == ".entry") {
        entry();
      } else if (word != ".visible" && word != ".weak") {
        expected("a directive of a module", word);
      }
    }
    return std::move(module_);
  }

 private:
  [[noreturn]] void expected(const std::string& what, const std::string& got) const {
    refuse(file_, line_, "expected " + what + ", but got '" + got + "'");
  }

  void skip() {  // space and comments
    for (; at_ < text_.size(); ++at_) {
      if (text_.compare(at_, 2, "//") == 0) at_ = text_.find('\n', at_);
      if (at_ >= text_.size()) return;
      if (text_[at_] == '\n') ++line_;
      if (!std::isspace(static_cast<unsigned char>(text_[at_]))) return;
    }
  }
  static bool in_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           c == '.';
  }
  // A word, with '::' where an opcode has it, or a single other character.
  std::string next_word() {
    skip();
    const size_t begin = at_;
    while (at_ < text_.size()) {
      if (in_word(text_[at_])) {
        ++at_;
      } else if (text_.compare(at_, 2, "::") == 0) {
        at_ += 2;
      } else {
        break;
      }
    }
    if (at_ == begin && at_ < text_.size()) ++at_;
    return text_.substr(begin, at_ - begin);
  }
  char peek() {
    skip();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void demand(char c) {
    if (!take(c)) expected(std::string("'") + c + "'", std::string(1, peek()));
  }
  void skip_past(char end) {
    while (at_ < text_.size() && text_[at_] != end) line_ += text_[at_++] == '\n';
    ++at_;
  }

  void dynamic_shared() {
    std::string word = next_word();
    if (word != ".shared") expected(".shared", word);
    while (peek() != '[' && peek() != ';') word = next_word();
    module_.shared.push_back(word);
    skip_past(';');
  }

  int bits_of(const std::string& type) const {
    if (type == ".pred") return 1;
    const size_t digits = type.find_first_of("0123456789");
    const int bits = digits == std::string::npos ? 0 : std::stoi(type.substr(digits));
    if (bits != 8 && bits != 16 && bits != 32 && bits != 64) expected("a type", type);
    return bits;
  }

  void parameter() {
    std::string word = next_word();
    if (word != ".param") expected(".param", word);
    uint32_t align = 0;
    word = next_word();
    if (word == ".align") align = std::stoul(next_word()), word = next_word();
    uint32_t bytes = static_cast<uint32_t>(bits_of(word)) / 8;
    if (align == 0) align = bytes;
    const std::string name = next_word();
    if (take('[')) bytes *= std::stoul(next_word()), demand(']');
    uint32_t& end = entry_->parameter_bytes;
    end = (end + align - 1) / align * align;
    entry_->parameters.push_back({name, end, bytes});
    end += bytes;
  }

  void entry() {
    const std::string name = next_word();
    if (!wanted_.empty() && name != wanted_) {
      const size_t next = text_.find(".entry ", at_);
      const size_t end = next == std::string::npos ? text_.size() : text_.rfind('\n', next);
      line_ += static_cast<int>(std::count(text_.begin() + static_cast<ptrdiff_t>(at_),
                                           text_.begin() + static_cast<ptrdiff_t>(end), '\n'));
      at_ = end;
      return;
    }
    entry_ = &module_.entries.emplace_back();
    entry_->name = name;
    scopes_ = 0, open_.assign(1, 0);
    if (take('(') && !take(')')) {
      do parameter();
      while (take(','));
      demand(')');
    }
    while (peek() == '.') {
      const std::string word = next_word();
      if (!kPragmas.contains(word)) expected("a directive of an entry", word);
      do next_word();
      while (take(','));
    }
    demand('{');
    while (!open_.empty()) statement();
  }

  void statement() {
    if (take('{')) return open_.push_back(++scopes_);
    if (take('}')) return open_.pop_back();
    if (peek() == '.') return directive();
    Statement made{};
    if (take('@')) {
      made.negated = take('!');
      made.guard = registered(next_word()).name;
    }
    made.opcode = next_word();
    made.line = line_;
    if (take(':')) {
      entry_->labels[made.opcode] = static_cast<uint32_t>(entry_->statements.size());
      return;
    }
    const bool jumps = made.opcode.starts_with("bra");
    while (!take(';')) {
      if (jumps) {
        made.operands.push_back({Operand::kLabel, next_word(), 0, {}});
      } else {
        made.operands.push_back(operand());
      }
      if (peek() != ';') demand(',');
    }
    entry_->statements.push_back(std::move(made));
  }

  void directive() {
    const std::string word = next_word();
    if (kPragmas.contains(word)) return skip_past(';');
    if (word != ".reg") expected("a directive of a body", word);
    const int bits = bits_of(next_word());
    do {
      const std::string name = next_word();
      if (take('<')) {
        const int count = std::stoi(next_word());
        demand('>');
        for (int i = 0; i < count; ++i) declare(name + std::to_string(i), bits);
      } else {
        declare(name, bits);
      }
    } while (take(','));
    demand(';');
  }
  // Of a block inside of the body, a register has the block's number in its name.
  static std::string scoped(const std::string& name, int scope) {
    return scope == 0 ? name : name + "#" + std::to_string(scope);
  }
  void declare(const std::string& name, int bits) {
    entry_->registers[scoped(name, open_.back())] = bits;
  }

  Operand registered(const std::string& word) const {
    for (auto scope = open_.rbegin(); scope != open_.rend(); ++scope) {
      const std::string name = scoped(word, *scope);
      if (entry_->registers.contains(name)) return {Operand::kRegister, name, 0, {}};
    }
    expected("a register", word);
  }

  Operand immediate(std::string word, bool negative) const {
    uint64_t value = 0;
    if (word.size() == 10 && word.starts_with("0f")) {
      value = std::stoull(word.substr(2), nullptr, 16);
    } else if (word.size() == 18 && word.starts_with("0d")) {
      value = std::stoull(word.substr(2), nullptr, 16);
    } else {
      if (word.ends_with('U')) word.pop_back();
      size_t read = 0;
      value = std::stoull(word, &read, 0);
      if (read != word.size()) expected("a number", word);
    }
    return {Operand::kImmediate, "", negative ? 0 - value : value, {}};
  }

  Operand operand() {
    if (take('{')) {
      Operand vector{Operand::kVector, "", 0, {}};
      do vector.parts.push_back(operand());
      while (take(','));
      demand('}');
      return vector;
    }
    if (take('[')) {
      Operand address{Operand::kAddress, "", 0, {operand()}};
      if (take('+')) {
        const bool negative = take('-');
        address.value = immediate(next_word(), negative).value;
      }
      while (take(',')) address.parts.push_back(operand());
      demand(']');
      return address;
    }
    const bool negative = take('-');
    const std::string word = next_word();
    if (std::isdigit(static_cast<unsigned char>(word[0]))) return immediate(word, negative);
    Operand found = named(word);
    if (take('|')) return {Operand::kPair, "", 0, {found, operand()}};
    return found;
  }

  Operand named(const std::string& word) const {
    if (word == "_") return {Operand::kSink, word, 0, {}};
    if (kSpecial.contains(word)) return {Operand::kSpecial, word, 0, {}};
    for (const Parameter& each : entry_->parameters)
      if (each.name == word) return {Operand::kSymbol, word, 0, {}};
    for (const std::string& each : module_.shared)
      if (each == word) return {Operand::kSymbol, word, 0, {}};
    return registered(word);
  }

  std::string file_, wanted_, text_;
  size_t at_ = 0;
  int line_ = 1, scopes_ = 0;
  std::vector<int> open_;  // blocks that are open
  Module module_;
  Entry* entry_ = nullptr;
};

}  // namespace

Module parse(const std::string& file, const std::string& entry) {
  return Parser(file, entry).module();
}

}  // namespace emulator::ptx
