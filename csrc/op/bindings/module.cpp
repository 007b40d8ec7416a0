// The pybind11 module lora_ext._C: queries and switches. The ops themselves are in the torch
// library `lora_ext` (ops.cpp), reached as torch.ops.lora_ext.
#include <torch/csrc/utils/pybind.h>

#include <set>

#include "common/bounds.h"
#include "common/rows.h"
#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/panel_choice.h"
#include "cpu/work_split.h"
#include "kernels/device.h"
#include "op/bindings/bindings.h"

#if defined(__clang__)
#define LORA_EXT_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define LORA_EXT_COMPILER "gcc " __VERSION__
#else
#define LORA_EXT_COMPILER "unknown"
#endif

PYBIND11_MODULE(_C, m) {
  namespace cpu = lora_ext::cpu;
  m.doc() = "Queries of the compiled extension; the ops are in torch.ops.lora_ext.";
  m.attr("with_cuda") = lora_ext::cuda::is_built();
  m.attr("compiler") = LORA_EXT_COMPILER;
  m.def("cpu_isa", &cpu::current_isa);
  m.def("available_cpu_isas", &cpu::available_isas);
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (cpu::set_isa(name)) return;
        std::string known = "auto, library";
        for (const std::string& isa : cpu::available_isas()) known += ", " + isa;
        throw py::value_error("lora_ext: expected one of " + known + ", but got " + name);
      },
      py::arg("name"));
  m.def(
      "set_cpu_panels",
      [](const std::string& name) {
        if (cpu::set_panels(name)) return;
        throw py::value_error("lora_ext: expected one of auto, none, float32, bfloat16, but got " +
                              name);
      },
      py::arg("name"));
  m.def(
      "cpu_panels",
      [](const at::ScalarType& x, bool batch_invariant) -> std::optional<at::ScalarType> {
        const auto panels = batch_invariant
                                ? cpu::batch_invariant_panel_dtype(lora_ext::dtype_of(x))
                                : cpu::panel_dtype(lora_ext::dtype_of(x));
        if (!panels) return {};
        return lora_ext::scalar_type_of(*panels);
      },
      py::arg("x_dtype"), py::arg("batch_invariant") = false);
  m.def("set_cpu_min_work", [](int64_t work) { cpu::min_work = work; }, py::arg("work") = 1 << 18);
  m.attr("cpu_panel_rows") = cpu::kMinPanelRows;
  m.attr("max_rank") = lora_ext::kMaxRank;
  m.def(
      "cpu_panels_of",
      [](const at::ScalarType& x, int64_t depth, int64_t cols, bool transposed,
         int64_t rows) -> std::optional<at::ScalarType> {
        const auto panel =
            cpu::faster_panel({lora_ext::dtype_of(x), depth, cols, transposed}, rows);
        if (!panel) return {};
        return lora_ext::scalar_type_of(*panel);
      },
      py::arg("x_dtype"), py::arg("depth"), py::arg("cols"), py::arg("transposed"),
      py::arg("rows"));
  m.def("cpu_product", &cpu::product, py::arg("p"), py::arg("q"), py::arg("bias"), py::arg("out"),
        py::arg("panels") = std::nullopt, py::call_guard<py::gil_scoped_release>());
  m.def(
      "cpu_panel_candidates",
      [](const at::ScalarType& x) {
        std::vector<at::ScalarType> found;
        for (const auto panel : cpu::panel_candidates(lora_ext::dtype_of(x))) {
          found.push_back(lora_ext::scalar_type_of(panel));
        }
        return found;
      },
      py::arg("x_dtype"));
  m.def(
      "cpu_panel_rule",
      [](const at::ScalarType& dtype, const std::set<std::string>& features) {
        const auto has = [&](const char* name) { return features.count(name) != 0; };
        const cpu::Processor processor{has("intel"), has("amx"), has("avx512_fp16"), has("float32"),
                                       has("bfloat16")};
        const lora_ext::Dtype x = lora_ext::dtype_of(dtype);
        std::vector<at::ScalarType> offered;
        for (const auto panel : {lora_ext::Dtype::kFloat32, lora_ext::Dtype::kBFloat16}) {
          if (cpu::is_offered(processor, panel, x)) {
            offered.push_back(lora_ext::scalar_type_of(panel));
          }
        }
        const auto rule = cpu::faster_panels(processor, x);
        return std::make_pair(rule ? std::optional(lora_ext::scalar_type_of(*rule)) : std::nullopt,
                              offered);
      },
      py::arg("x_dtype"), py::arg("features"));
  m.def(
      "set_measured_panels",
      [](const at::ScalarType& x, int64_t depth, int64_t cols, bool transposed,
         const std::vector<std::pair<int64_t, std::optional<at::ScalarType>>>& measured) {
        cpu::MeasuredPanels found;
        for (const auto& [rows, panel] : measured) {
          if (rows < 1) throw py::value_error("lora_ext: expected rows of at least 1");
          if (panel && *panel != at::kFloat && *panel != at::kBFloat16) {
            throw py::value_error("lora_ext: expected panels of float32, of bfloat16 or none");
          }
          found[rows] = panel ? std::optional(lora_ext::dtype_of(*panel)) : std::nullopt;
        }
        cpu::set_measured_panels({lora_ext::dtype_of(x), depth, cols, transposed},
                                 std::move(found));
      },
      py::arg("x_dtype"), py::arg("depth"), py::arg("cols"), py::arg("transposed"),
      py::arg("measured"));
  m.def(
      "cpu_library_reason",
      [](const at::ScalarType& x, int64_t rank) { return cpu::library_reason(x, x, rank); },
      py::arg("x_dtype"), py::arg("rank"));
  m.def(
      "rows_of_block",
      [](int64_t columns, const at::ScalarType& dtype, const at::Device& device) {
        return lora_ext::rows_of_block(columns, dtype, device.type());
      },
      py::arg("columns"), py::arg("dtype"), py::arg("device"));
  lora_ext::bind_plan(m);
  lora_ext::bind_kernel_set(m);
  lora_ext::bind_kernel_check(m);
}
