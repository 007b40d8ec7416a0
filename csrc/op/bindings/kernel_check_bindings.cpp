// The check of kernels on a device in the module lora_ext._C.
#include "op/bindings/plan_bindings.h"
#include "op/check/kernel_check.h"
#include "op/launch/kernel_launch.h"
#include "op/route/kernel_route.h"

namespace lora_ext {
namespace {

namespace py = pybind11;

using kernel_set::Kernels;

std::string spoken(const std::string& result) { return result.empty() ? "passed" : result; }

// torch's own warnings reach Python only from some of the paths into an op. This one always does,
// so that Python can filter it or turn it into an error.
void warn_in_python(const std::string& text) {
  const py::gil_scoped_acquire gil;
  if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0) throw py::error_already_set();
}

}  // namespace

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
  m.def("use_pdl", &kernel_route::current_pdl);
}

}  // namespace lora_ext
