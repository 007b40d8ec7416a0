// Which kernels a plan uses, the small case of each, and their check on a device, in the module
// lora_ext._C.
#include <pybind11/operators.h>

#include <map>

#include "kernels/plan/decode_shares.h"
#include "op/bindings/bindings.h"
#include "op/check/kernel_check.h"
#include "op/launch/kernel_launch.h"

namespace lora_ext {
namespace {

namespace py = pybind11;
using kernel_set::Kernels;

std::pair<plan::Problem, plan::Plan> planned_small_case(const Kernels& kernels,
                                                        const plan::Card& card) {
  const kernel_set::SmallCase small = kernel_set::small_case(kernels);
  return {small.problem, plan::make_plan(card, small.problem, small.request)};
}

// With groups != 0 the plan is for many adapters with an index for each row, in a list or a pool; or
// for experts with weights of their own.
plan::Plan plan_as_asked(const plan::Card& card, plan::Problem problem, bool backward,
                         const std::string& choice, const std::string& tile, bool use_pdl,
                         int64_t groups, bool listed, bool own_weights) {
  problem.backward = backward;
  if (groups != 0) problem.groups = plan::Groups{groups, !own_weights, listed, own_weights};
  const plan::Request request{choice_of(choice), plan::tile_named(tile), "", use_pdl};
  return plan::make_plan(card, problem, request);
}

// The numbers that tests compare with the limits of a card: offsets and pitches in the workspace,
// as in plan.h, and the tile's shared memory and grids. kNone stands for a number that the plan
// does not have.
std::map<std::string, int64_t> plan_numbers(const plan::Plan& plan) {
  plan::Tile tile = plan::Tile::kDecode;
  std::map<std::string, int64_t> numbers;
  if (const plan::Tiled* p = plan.tiled()) {
    tile = p->gemm ? p->gemm->tile : plan::Tile::k128x64;
    numbers = {{"a", p->a},         {"b", p->b},
               {"t", p->t},         {"z", p->z},
               {"s", p->s},         {"g_a", p->g_a},
               {"g_b", p->g_b},     {"a_pitch", p->a_pitch},
               {"terms", p->terms}, {"z_columns", p->z_columns}};
    if (p->tables) {
      const plan::Tables& tables = *p->tables;
      numbers.insert({{"entries", tables.entries},
                      {"gradient_entries", tables.gradient_entries},
                      {"order", tables.order},
                      {"counts", tables.counts},
                      {"segments", tables.segments},
                      {"first", tables.first},
                      {"tiles", tables.tiles},
                      {"row_tiles", tables.row_tiles},
                      {"pieces", tables.pieces},
                      {"sums", tables.sums},
                      {"ranks", tables.ranks},
                      {"piece_rows", tables.piece_rows},
                      {"tile_count", tables.tile_count},
                      {"row_tile_count", tables.row_tile_count},
                      {"piece_count", tables.piece_count},
                      {"slots", tables.slots}});
    }
  }
  if (const plan::Decode* p = plan.decode()) {
    numbers = {{"sums", p->sums},
               {"s_sums", p->s_sums},
               {"t", p->t},
               {"flags", p->flags},
               {"batch", p->batch},
               {"terms", p->terms},
               {"tiles", p->tiles},
               {"s_tiles", p->s_tiles},
               {"width", p->width},
               {"flag_count", p->flag_count()},
               {"entries", p->entries}};
  }
  const plan::TileFacts& facts = plan::facts_of(tile);
  numbers.insert({{"shared", facts.shared}, {"rows", facts.rows}, {"columns", facts.columns}});
  return numbers;
}

std::string spoken(const std::string& result) { return result.empty() ? "passed" : result; }

// torch's own warnings reach Python only from some of the paths into an op. This one always does,
// so that Python can filter it or turn it into an error.
void warn_in_python(const std::string& text) {
  const py::gil_scoped_acquire gil;
  if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0) throw py::error_already_set();
}

}  // namespace

void bind_kernel_set(py::module& m) {
  m.def(
      "runs_kernels",
      [](const at::Device& device) {
        if (!kernel_launch::has_kernels(device)) return false;
        const plan::Card card = kernel_launch::card_of(device);
        return card.error.empty() && card.arch >= 80;
      },
      py::arg("device"));
  py::class_<Kernels>(m, "Kernels")
      .def_property_readonly("name", &Kernels::name)
      .def_readonly("backward", &Kernels::backward)
      .def_property_readonly("dtype",
                             [](const Kernels& kernels) { return scalar_type_of(kernels.dtype); })
      .def("small_case", &planned_small_case, py::arg("card"))
      .def(py::self == py::self)
      .def("__hash__", [](const Kernels& kernels) { return py::hash(py::str(kernels.name())); })
      .def("__repr__", &Kernels::name);
  m.def("plan_numbers", &plan_numbers, py::arg("plan"));
  // Tests compare these with a plain loop over blocks.
  using Shares = plan::DecodeShares;
  py::class_<Shares>(m, "DecodeShares")
      .def(py::init([](int tiles, int s_tiles, int steps, int blocks) {
             return Shares{tiles, s_tiles, steps, blocks};
           }),
           py::arg("tiles"), py::arg("s_tiles"), py::arg("steps"), py::arg("blocks"))
      .def("first_chunk", &Shares::first_chunk, py::arg("block"))
      .def("first_unit", &Shares::first_unit, py::arg("block"))
      .def("block_of", &Shares::block_of, py::arg("unit"))
      .def(
          "s_parts",
          [](const Shares& shares, int tile) {
            const Shares::Parts parts = shares.s_parts(tile);
            return std::pair(parts.slot, parts.count);
          },
          py::arg("tile"))
      .def("s_slot", &Shares::s_slot, py::arg("tile"), py::arg("chunk"), py::arg("block"))
      .def_property_readonly("slots", &Shares::slots)
      .def_property_readonly("s_slots", &Shares::s_slots)
      .def_property_readonly("chunks", &Shares::chunks);
  m.def("all_kernels", &kernel_set::all_of, py::arg("card"), py::arg("use_pdl"));
  m.def("all_grouped_kernels", &kernel_set::all_grouped_of, py::arg("card"));
  m.def(
      "kernels_of",
      [](const plan::Plan& plan, plan::Problem problem, bool backward) {
        problem.backward = backward;
        return kernel_set::of_plan(plan, problem);
      },
      py::arg("plan"), py::arg("problem"), py::kw_only(), py::arg("backward"));
  m.def("plan_as_asked", &plan_as_asked, py::arg("card"), py::arg("problem"), py::kw_only(),
        py::arg("backward"), py::arg("choice"), py::arg("tile") = "", py::arg("use_pdl") = true,
        py::arg("groups") = 0, py::arg("listed") = false, py::arg("own_weights") = false);
}

void bind_kernel_check(py::module& m) {
  kernel_check::set_warn(&warn_in_python);
  m.def(
      "check_kernels",
      [](const at::Device& device, const Kernels& kernels) {
        return spoken(kernel_check::check(device, kernel_launch::card_of(device), kernels));
      },
      py::arg("device"), py::arg("kernels"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "check_result",
      [](const at::Device& device, const Kernels& kernels) {
        return spoken(kernel_check::result(device, kernels));
      },
      py::arg("device"), py::arg("kernels"));
  m.def(
      "check_results",
      [](const at::Device& device) {
        std::vector<std::pair<std::string, std::string>> all;
        for (const auto& [kernels, result] : kernel_check::results(device))
          all.emplace_back(kernels.name(), spoken(result));
        return all;
      },
      py::arg("device"));
  m.def(
      "remember_check",
      [](const at::Device& device, const Kernels& kernels, const std::string& result) {
        kernel_check::remember(device, kernels, result == "passed" ? "" : result);
      },
      py::arg("device"), py::arg("kernels"), py::arg("result"));
  m.def("set_check_timeout", &kernel_check::set_timeout, py::arg("seconds"));
  m.def("check_timeout", &kernel_check::timeout);
}

}  // namespace lora_ext
