// Fault sites of kernels under test. A kernel takes a `class Fault` and wraps each barrier, fence,
// wait, count and predicate in one of the five functions below; the name of the site says which.
// With NoFault, the default, every site is a constant and nothing of it reaches the device. With
// PlantedFault one site misbehaves, chosen at run time, so that one binary holds every mutant of a
// kernel.
//
//   site in the source                        mutants            with the mutant planted
//   if (!Fault::skip("s")) statement;         s                  the statement is left out
//   if (Fault::swap("s")) wrong; else right;  s                  the wrong statement runs instead
//   Fault::value("s", right, wrong)           s                  wrong
//   Fault::count("s", right, low, high)       s:low, s:high      low, or high
//   Fault::flag("s", condition)               s:always, s:never  true, or false
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <type_traits>

#include "kernel/fault.h"

namespace emulator {

using lora_ext::kernel::NoFault;

// Plants one mutant, named as in the table above; an empty name plants none.
void plant_fault(const char* mutant);

// How often a kernel came by the planted mutant's site: a mutant that no test case reaches proves
// nothing.
uint64_t planted_fault_reached();

// From now on, keeps the name of every site that a kernel comes by.
void record_fault_sites();
const std::set<std::string>& recorded_fault_sites();

// Whether the mutant `site` + `direction` is the planted one.
bool fault_is_planted(const char* site, const char* direction);

struct PlantedFault {
  static bool skip(const char* site) { return fault_is_planted(site, ""); }
  static bool swap(const char* site) { return fault_is_planted(site, ""); }
  template <class V>
  static V value(const char* site, V right, std::type_identity_t<V> wrong) {
    return fault_is_planted(site, "") ? wrong : right;
  }
  template <class V>
  static V count(const char* site, V right, std::type_identity_t<V> low,
                 std::type_identity_t<V> high) {
    if (fault_is_planted(site, ":low")) return low;
    return fault_is_planted(site, ":high") ? high : right;
  }
  static bool flag(const char* site, bool right) {
    if (fault_is_planted(site, ":always")) return true;
    return !fault_is_planted(site, ":never") && right;
  }
};

}  // namespace emulator
