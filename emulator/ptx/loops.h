// Loops over the lanes of a warp, for instructions whose result depends on their own lane alone.
#pragma once
#include "emulator/ptx/decoder.h"

namespace emulator::ptx {

template <class T>
constexpr int kBits = static_cast<int>(sizeof(T)) * 8;

// The lanes that an operation leaves undefined: where one of its operands is.
template <class... Slots>
void follow(Warp& warp, uint32_t lanes, uint32_t result, Slots... operands) {
  const uint32_t undefined = (warp.undefined[operands] | ... | 0u);
  warp.undefined[result] = (warp.undefined[result] & ~lanes) | (undefined & lanes);
}

template <class F>
void for_lanes(uint32_t lanes, F&& f) {
  if (lanes == kAll) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (const uint32_t lane : Lanes(lanes)) f(lane);
  }
}

template <class D, class A, class F>
Step unary(Warp& warp, const Operation& o, uint32_t lanes) {
  D* d = warp.lanes_of<D>(o.d);
  const A* a = warp.lanes_of<A>(o.a);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = static_cast<D>(F{}(a[lane])); });
  follow(warp, lanes, o.d, o.a);
  return Step::kNext;
}

template <class D, class A, class B, class F>
Step binary(Warp& warp, const Operation& o, uint32_t lanes) {
  D* d = warp.lanes_of<D>(o.d);
  const A* a = warp.lanes_of<A>(o.a);
  const B* b = warp.lanes_of<B>(o.b);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = static_cast<D>(F{}(a[lane], b[lane])); });
  follow(warp, lanes, o.d, o.a, o.b);
  return Step::kNext;
}

template <class T, class F>
Step ternary(Warp& warp, const Operation& o, uint32_t lanes) {
  T* d = warp.lanes_of<T>(o.d);
  const T *a = warp.lanes_of<T>(o.a), *b = warp.lanes_of<T>(o.b), *c = warp.lanes_of<T>(o.c);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = F{}(a[lane], b[lane], c[lane]); });
  follow(warp, lanes, o.d, o.a, o.b, o.c);
  return Step::kNext;
}

template <class T, class F>
Step compare(Warp& warp, const Operation& o, uint32_t lanes) {
  const T *a = warp.lanes_of<T>(o.a), *b = warp.lanes_of<T>(o.b);
  uint32_t holds = 0;
  for_lanes(kAll, [&](uint32_t lane) { holds |= uint32_t{F{}(a[lane], b[lane])} << lane; });
  uint32_t& d = warp.predicate(o.d);
  d = (d & ~lanes) | (holds & lanes);
  follow(warp, lanes, o.d, o.a, o.b);
  return Step::kNext;
}

template <class F>
Step of_predicates(Warp& warp, const Operation& o, uint32_t lanes) {
  const uint32_t a = warp.predicate(o.a), b = o.b == kNone ? 0 : warp.predicate(o.b);
  uint32_t& d = warp.predicate(o.d);
  d = (d & ~lanes) | (F{}(a, b) & lanes);
  follow(warp, lanes, o.d, o.a, o.b == kNone ? o.a : o.b);
  return Step::kNext;
}

template <class T>
Step select(Warp& warp, const Operation& o, uint32_t lanes) {
  T* d = warp.lanes_of<T>(o.d);
  const T *a = warp.lanes_of<T>(o.a), *b = warp.lanes_of<T>(o.b);
  const uint32_t first = warp.predicate(o.c);
  for_lanes(lanes, [&](uint32_t lane) { d[lane] = first >> lane & 1 ? a[lane] : b[lane]; });
  const uint32_t undefined =
      warp.undefined[o.c] | (first & warp.undefined[o.a]) | (~first & warp.undefined[o.b]);
  warp.undefined[o.d] = (warp.undefined[o.d] & ~lanes) | (undefined & lanes);
  return Step::kNext;
}

inline Step blocked(Warp& warp, const std::string& on) {
  warp.waits_for = on;
  return Step::kBlocked;
}

}  // namespace emulator::ptx
