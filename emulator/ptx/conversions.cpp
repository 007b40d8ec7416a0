// Moves and conversions.
#include <cmath>

#include "emulator/matrix/formats.h"
#include "emulator/ptx/loops.h"

namespace emulator::ptx {
namespace {

template <class D, class A, class F>
void converts(Table& table, const char* opcode, F) {
  table[opcode] = plain(unary<D, A, F>, {kBits<D>, kBits<A>});
}
template <class D, class A>
void casts(Table& table, const std::string& opcode) {
  converts<D, A>(table, opcode.c_str(), [](A a) { return static_cast<D>(a); });
}

int bits_of_type(const std::string& opcode) {
  return std::stoi(opcode.substr(opcode.find_last_of('.') + 2));
}

template <class T>
Step move(Warp& warp, const Operation& o, uint32_t lanes) {
  T* d = warp.lanes_of<T>(o.d);
  const T* a = warp.lanes_of<T>(o.a);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = a[lane]; });
  follow(warp, lanes, o.d, o.a);
  return Step::kNext;
}
Run move_of(int bits) {
  return bits == 16 ? move<uint16_t> : bits == 32 ? move<uint32_t> : move<uint64_t>;
}

// mov.b32 d, {a, b} and mov.b64: two halves of a register, the low one first.
template <class Whole, class Half>
Step pack(Warp& warp, const Operation& o, uint32_t lanes) {
  Whole* d = warp.lanes_of<Whole>(o.d);
  const Half *low = warp.lanes_of<Half>(o.list[0]), *high = warp.lanes_of<Half>(o.list[1]);
  for_lanes(lanes, [&](uint32_t lane) {
    d[lane] = static_cast<Whole>(low[lane]) | static_cast<Whole>(high[lane]) << sizeof(Half) * 8;
  });
  follow(warp, lanes, o.d, o.list[0], o.list[1]);
  return Step::kNext;
}
template <class Whole, class Half>
Step unpack(Warp& warp, const Operation& o, uint32_t lanes) {
  const Whole* a = warp.lanes_of<Whole>(o.a);
  for (int half = 0; half < 2; ++half) {
    Half* d = warp.lanes_of<Half>(o.list[half]);
    for_lanes(lanes, [&](uint32_t lane) {
      d[lane] = static_cast<Half>(a[lane] >> sizeof(Half) * 8 * half);
    });
    follow(warp, lanes, o.list[half], o.a);
  }
  return Step::kNext;
}

void make_move(Decoder& decoder, const Statement& statement, Operation& made) {
  decoder.demand_operands(statement, 2);
  const int bits = bits_of_type(statement.opcode);
  const Operand &to = statement.operands[0], &from = statement.operands[1];
  const bool packs = from.kind == Operand::kVector, unpacks = to.kind == Operand::kVector;
  if (!packs && !unpacks) {
    made.run = move_of(bits);
    made.d = decoder.result(to, bits), made.a = decoder.source(from, bits);
    return;
  }
  if (packs == unpacks || (bits != 32 && bits != 64) || (packs ? from : to).parts.size() != 2)
    decoder.refuse("expected two halves and a whole of 32 or 64 bits");
  for (const Operand& part : (packs ? from : to).parts)
    made.list.push_back(packs ? decoder.source(part, bits / 2) : decoder.result(part, bits / 2));
  if (packs) {
    made.d = decoder.result(to, bits);
    made.run = bits == 32 ? pack<uint32_t, uint16_t> : pack<uint64_t, uint32_t>;
  } else {
    made.a = decoder.source(from, bits);
    made.run = bits == 32 ? unpack<uint32_t, uint16_t> : unpack<uint64_t, uint32_t>;
  }
}

// cvt.s32.s8: the lowest byte of a register, which may be of 16 bits or of 32.
void make_low_byte(Decoder& decoder, const Statement& statement, Operation& made) {
  decoder.demand_operands(statement, 2);
  const auto low_byte = [](auto a) -> int32_t { return static_cast<int8_t>(a); };
  const int bits = decoder.bits_of(statement.operands[1]);
  const Run run = bits == 32 ? unary<int32_t, int32_t, decltype(low_byte)>
                             : unary<int32_t, int16_t, decltype(low_byte)>;
  plain(run, {32, bits == 32 ? 32 : 16})(decoder, statement, made);
}

// To an integer: out of its range the nearest, 0 for NaN (PTX ISA, "cvt").
template <class D>
D clamped(double value) {
  if (std::isnan(value)) return 0;
  constexpr double least = static_cast<double>(std::numeric_limits<D>::min());
  constexpr double most = static_cast<double>(std::numeric_limits<D>::max());
  return value <= least  ? std::numeric_limits<D>::min()
         : value >= most ? std::numeric_limits<D>::max()
                         : static_cast<D>(value);
}

template <class D, class A>
void floats_to_integers(Table& table, const std::string& d, const std::string& a) {
  const std::string types = "." + d + "." + a;
  converts<D, A>(table, ("cvt.rzi" + types).c_str(), [](A x) { return clamped<D>(std::trunc(x)); });
  converts<D, A>(table, ("cvt.rni" + types).c_str(),
                 [](A x) { return clamped<D>(std::nearbyint(x)); });
  converts<D, A>(table, ("cvt.rmi" + types).c_str(), [](A x) { return clamped<D>(std::floor(x)); });
  converts<D, A>(table, ("cvt.rpi" + types).c_str(), [](A x) { return clamped<D>(std::ceil(x)); });
}

}  // namespace

void add_conversions(Table& table) {
  for (const char* type :
       {"b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"})
    table[std::string("mov.") + type] = make_move;
  for (const char* opcode : {"cvta.to.global.u64", "cvta.global.u64", "cvta.param.u64"})
    table[opcode] = plain(move<uint64_t>, {64, 64});  // one address space holds both here
  casts<uint32_t, uint64_t>(table, "cvt.u32.u64"), casts<uint32_t, uint64_t>(table, "cvt.s32.s64");
  casts<int64_t, int32_t>(table, "cvt.s64.s32"), casts<uint64_t, uint32_t>(table, "cvt.u64.u32");
  casts<uint16_t, uint32_t>(table, "cvt.u16.u32"), casts<uint32_t, uint16_t>(table, "cvt.u32.u16");
  casts<uint16_t, uint64_t>(table, "cvt.u16.u64"), casts<uint64_t, uint16_t>(table, "cvt.u64.u16");
  casts<int32_t, int16_t>(table, "cvt.s32.s16"), casts<int64_t, int16_t>(table, "cvt.s64.s16");
  converts<int16_t, int16_t>(table, "cvt.s16.s8", [](int16_t a) { return static_cast<int8_t>(a); });
  table["cvt.s32.s8"] = make_low_byte;
  casts<float, int16_t>(table, "cvt.rn.f32.s16"), casts<float, int32_t>(table, "cvt.rn.f32.s32");
  casts<float, uint16_t>(table, "cvt.rn.f32.u16"), casts<float, uint32_t>(table, "cvt.rn.f32.u32");
  casts<float, double>(table, "cvt.rn.f32.f64"), casts<double, float>(table, "cvt.f64.f32");
  casts<float, int64_t>(table, "cvt.rn.f32.s64"), casts<float, uint64_t>(table, "cvt.rn.f32.u64");
  floats_to_integers<int32_t, float>(table, "s32", "f32");
  floats_to_integers<uint32_t, float>(table, "u32", "f32");
  converts<uint16_t, float>(table, "cvt.rn.bf16.f32", [](float a) { return float_to_bfloat16(a); });
  converts<uint16_t, float>(table, "cvt.rn.f16.f32", [](float a) { return float_to_float16(a); });
  converts<float, uint16_t>(table, "cvt.f32.bf16", [](uint16_t a) { return bfloat16_to_float(a); });
  converts<float, uint16_t>(table, "cvt.f32.f16", [](uint16_t a) { return float16_to_float(a); });
  // The first operand becomes the upper half.
  const auto bf16x2 = [](float high, float low) {
    return static_cast<uint32_t>(float_to_bfloat16(high)) << 16 | float_to_bfloat16(low);
  };
  const auto f16x2 = [](float high, float low) {
    return static_cast<uint32_t>(float_to_float16(high)) << 16 | float_to_float16(low);
  };
  table["cvt.rn.bf16x2.f32"] =
      plain(binary<uint32_t, float, float, decltype(bf16x2)>, {32, 32, 32});
  table["cvt.rn.f16x2.f32"] = plain(binary<uint32_t, float, float, decltype(f16x2)>, {32, 32, 32});
}

}  // namespace emulator::ptx
