// Integer and floating-point arithmetic, logic, comparisons and selections.
//
// A product and a sum without .rn may be contracted to a multiply-add (PTX ISA, "mul", "add"): here
// each is rounded. Tests bound the difference.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>

#include "emulator/ptx/loops.h"

namespace emulator::ptx {
namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

template <class T, class F>
void one(Table& table, const char* opcode, F) {
  table[opcode] = plain(unary<T, T, F>, {kBits<T>, kBits<T>});
}
template <class T, class F>
void two(Table& table, const char* opcode, F) {
  table[opcode] = plain(binary<T, T, T, F>, {kBits<T>, kBits<T>, kBits<T>});
}
template <class D, class T, class F>
void wide(Table& table, const char* opcode, F) {
  table[opcode] = plain(binary<D, T, T, F>, {kBits<D>, kBits<T>, kBits<T>});
}
template <class T, class F>
void three(Table& table, const char* opcode, F) {
  table[opcode] = plain(ternary<T, F>, {kBits<T>, kBits<T>, kBits<T>, kBits<T>});
}
template <class T, class F>
void shift(Table& table, const char* opcode, F) {
  table[opcode] = plain(binary<T, T, u32, F>, {kBits<T>, kBits<T>, 32});
}
template <class T, class F>
void compares(Table& table, const std::string& opcode, F) {
  table[opcode] = plain(compare<T, F>, {1, kBits<T>, kBits<T>});
}

// In the width of an unsigned type, so that nothing overflows.
template <class T>
void integers(Table& table, const std::string& type, bool is_signed) {
  const auto name = [&](const char* what) { return std::string(what) + "." + type; };
  using U = std::make_unsigned_t<T>;
  two<U>(table, name("add").c_str(), [](U a, U b) { return static_cast<U>(a + b); });
  two<U>(table, name("sub").c_str(), [](U a, U b) { return static_cast<U>(a - b); });
  two<U>(table, name("mul.lo").c_str(), [](U a, U b) { return static_cast<U>(u64{a} * b); });
  two<T>(table, name("min").c_str(), [](T a, T b) { return std::min(a, b); });
  two<T>(table, name("max").c_str(), [](T a, T b) { return std::max(a, b); });
  three<U>(table, name("mad.lo").c_str(),
           [](U a, U b, U c) { return static_cast<U>(u64{a} * b + c); });
  // By zero the result is unspecified (PTX ISA, "div"): all ones, as on cards.
  two<T>(table, name("div").c_str(), [](T a, T b) -> T {
    return b == 0                                    ? static_cast<T>(-1)
           : b == static_cast<T>(-1) && T(-1) < T(0) ? T(U(0) - U(a))
                                                     : T(a / b);
  });
  two<T>(table, name("rem").c_str(), [](T a, T b) -> T {
    return b == 0 ? a : b == static_cast<T>(-1) && T(-1) < T(0) ? T(0) : T(a % b);
  });
  if (is_signed) {
    one<T>(table, name("neg").c_str(), [](T a) { return static_cast<T>(U(0) - U(a)); });
    one<T>(table, name("abs").c_str(), [](T a) { return a < 0 ? static_cast<T>(U(0) - U(a)) : a; });
  }
  shift<T>(table, name("shr").c_str(), [](T a, u32 by) -> T {
    const u32 most = sizeof(T) * 8 - 1;
    return by > most ? (T(-1) < T(0) ? T(a >> most) : T(0)) : T(a >> by);
  });
  compares<T>(table, name("setp.lt"), [](T a, T b) { return a < b; });
  compares<T>(table, name("setp.le"), [](T a, T b) { return a <= b; });
  compares<T>(table, name("setp.gt"), [](T a, T b) { return a > b; });
  compares<T>(table, name("setp.ge"), [](T a, T b) { return a >= b; });
  compares<T>(table, name("setp.eq"), [](T a, T b) { return a == b; });
  compares<T>(table, name("setp.ne"), [](T a, T b) { return a != b; });
}

template <class U>
void logic(Table& table, const std::string& type) {
  const auto name = [&](const char* what) { return std::string(what) + "." + type; };
  two<U>(table, name("and").c_str(), [](U a, U b) { return static_cast<U>(a & b); });
  two<U>(table, name("or").c_str(), [](U a, U b) { return static_cast<U>(a | b); });
  two<U>(table, name("xor").c_str(), [](U a, U b) { return static_cast<U>(a ^ b); });
  one<U>(table, name("not").c_str(), [](U a) { return static_cast<U>(~a); });
  shift<U>(table, name("shl").c_str(), [](U a, u32 by) -> U {
    return by >= sizeof(U) * 8 ? U(0) : static_cast<U>(u64{a} << by);
  });
  compares<U>(table, name("setp.eq"), [](U a, U b) { return a == b; });
  compares<U>(table, name("setp.ne"), [](U a, U b) { return a != b; });
}

template <class T>
void floats(Table& table, const std::string& type) {
  for (const char* rounding : {"", ".rn"}) {
    const auto name = [&](const char* what) { return what + std::string(rounding) + "." + type; };
    two<T>(table, name("add").c_str(), [](T a, T b) { return a + b; });
    two<T>(table, name("sub").c_str(), [](T a, T b) { return a - b; });
    two<T>(table, name("mul").c_str(), [](T a, T b) { return a * b; });
  }
  three<T>(table, ("fma.rn." + type).c_str(), [](T a, T b, T c) { return std::fma(a, b, c); });
  two<T>(table, ("div.rn." + type).c_str(), [](T a, T b) { return a / b; });
  two<T>(table, ("min." + type).c_str(), [](T a, T b) { return std::fmin(a, b); });
  two<T>(table, ("max." + type).c_str(), [](T a, T b) { return std::fmax(a, b); });
  one<T>(table, ("abs." + type).c_str(), [](T a) { return std::fabs(a); });
  one<T>(table, ("neg." + type).c_str(), [](T a) { return -a; });
  // copysign d, a, b: b with the sign of a.
  two<T>(table, ("copysign." + type).c_str(), [](T a, T b) { return std::copysign(b, a); });
  const auto both = [&](const char* what, auto ordered) {
    compares<T>(table, std::string("setp.") + what + "." + type, ordered);
  };
  both("lt", [](T a, T b) { return a < b; }), both("ltu", [](T a, T b) { return !(a >= b); });
  both("le", [](T a, T b) { return a <= b; }), both("leu", [](T a, T b) { return !(a > b); });
  both("gt", [](T a, T b) { return a > b; }), both("gtu", [](T a, T b) { return !(a <= b); });
  both("ge", [](T a, T b) { return a >= b; }), both("geu", [](T a, T b) { return !(a < b); });
  both("eq", [](T a, T b) { return a == b; });
  both("equ", [](T a, T b) { return !(a < b || a > b); });
  both("ne", [](T a, T b) { return a < b || a > b; });
  both("neu", [](T a, T b) { return !(a == b); });
  both("nan", [](T a, T b) { return std::isnan(a) || std::isnan(b); });
  both("num", [](T a, T b) { return !std::isnan(a) && !std::isnan(b); });
}

// bfi d, a, b, c, length: the low bits of a, put into b from bit c on.
Step bit_field_insert(Warp& warp, const Operation& o, uint32_t lanes) {
  u32* d = warp.lanes_of<u32>(o.d);
  const u32 *a = warp.lanes_of<u32>(o.a), *b = warp.lanes_of<u32>(o.b),
            *c = warp.lanes_of<u32>(o.c), *length = warp.lanes_of<u32>(o.list[0]);
  for_lanes(lanes, [&](u32 lane) {
    const u32 from = c[lane] & 0xFF, bits = length[lane] & 0xFF;
    const u64 mask = from > 31 ? 0 : (bits > 31 ? ~u64{0} : (u64{1} << bits) - 1) << from;
    d[lane] = static_cast<u32>((b[lane] & ~mask) | (u64{a[lane]} << (from & 31) & mask));
  });
  follow(warp, lanes, o.d, o.a, o.b, o.c, o.list[0]);
  return Step::kNext;
}

u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = selector >> 4 * i & 0xF;
    u32 byte = static_cast<u32>(bytes >> 8 * (nibble & 7)) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

Step move_predicate(Warp& warp, const Operation& o, uint32_t lanes) {
  uint32_t& d = warp.predicate(o.d);
  d = (d & ~lanes) | (warp.predicate(o.a) & lanes);
  follow(warp, lanes, o.d, o.a);
  return Step::kNext;
}

}  // namespace

void add_arithmetic(Table& table) {
  integers<s16>(table, "s16", true), integers<s32>(table, "s32", true);
  integers<s64>(table, "s64", true), integers<u16>(table, "u16", false);
  integers<u32>(table, "u32", false), integers<u64>(table, "u64", false);
  logic<u16>(table, "b16"), logic<u32>(table, "b32"), logic<u64>(table, "b64");
  floats<float>(table, "f32"), floats<double>(table, "f64");
  wide<u32, u16>(table, "mul.wide.u16", [](u16 a, u16 b) { return u32{a} * b; });
  wide<s32, s16>(table, "mul.wide.s16", [](s16 a, s16 b) { return s32{a} * b; });
  wide<u64, u32>(table, "mul.wide.u32", [](u32 a, u32 b) { return u64{a} * b; });
  wide<s64, s32>(table, "mul.wide.s32", [](s32 a, s32 b) { return s64{a} * b; });
  two<s32>(table, "mul.hi.s32", [](s32 a, s32 b) { return static_cast<s32>(s64{a} * b >> 32); });
  two<u32>(table, "mul.hi.u32", [](u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); });
  three<u32>(table, "prmt.b32", [](u32 a, u32 b, u32 c) { return permute(a, b, c); });
  one<u32>(table, "brev.b32", [](u32 a) {
    u32 reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
  });
  one<u32>(table, "popc.b32", [](u32 a) { return static_cast<u32>(std::popcount(a)); });
  one<u32>(table, "clz.b32", [](u32 a) { return static_cast<u32>(std::countl_zero(a)); });
  // The left shift that brings the highest one to bit 31; all ones without one.
  one<u32>(table, "bfind.shiftamt.u32",
           [](u32 a) { return a == 0 ? ~0u : static_cast<u32>(std::countl_zero(a)); });
  const auto negate = [](u32 a, u32) { return ~a; };
  const auto both = [](u32 a, u32 b) { return a & b; };
  const auto either = [](u32 a, u32 b) { return a | b; };
  const auto differ = [](u32 a, u32 b) { return a ^ b; };
  table["not.pred"] = plain(of_predicates<decltype(negate)>, {1, 1});
  table["and.pred"] = plain(of_predicates<decltype(both)>, {1, 1, 1});
  table["or.pred"] = plain(of_predicates<decltype(either)>, {1, 1, 1});
  table["xor.pred"] = plain(of_predicates<decltype(differ)>, {1, 1, 1});
  table["mov.pred"] = plain(move_predicate, {1, 1});
  for (const char* type : {"b16", "u16", "s16"})
    table[std::string("selp.") + type] = plain(select<u16>, {16, 16, 16, 1});
  for (const char* type : {"b32", "u32", "s32", "f32"})
    table[std::string("selp.") + type] = plain(select<u32>, {32, 32, 32, 1});
  for (const char* type : {"b64", "u64", "s64", "f64"})
    table[std::string("selp.") + type] = plain(select<u64>, {64, 64, 64, 1});
  table["bfi.b32"] = [](Decoder& decoder, const Statement& statement, Operation& made) {
    decoder.demand_operands(statement, 5);
    const auto& operands = statement.operands;
    made.run = bit_field_insert, made.d = decoder.result(operands[0], 32);
    made.a = decoder.source(operands[1], 32), made.b = decoder.source(operands[2], 32);
    made.c = decoder.source(operands[3], 32), made.list.push_back(decoder.source(operands[4], 32));
  };
}

}  // namespace emulator::ptx
