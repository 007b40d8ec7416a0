#include "plan_bindings.h"

#include <map>

#include "plan.h"

#ifdef LORA_EXT_WITH_CUDA
#include "kernel_check.h"
#include "kernel_launch.h"
#include "kernel_route.h"
#endif

namespace lora_ext {
namespace {

namespace py = pybind11;

const std::map<std::string, plan::Choice> kChoices = {{"auto", plan::Choice::kAuto},
                                                      {"kernel", plan::Choice::kKernel},
                                                      {"hybrid", plan::Choice::kHybrid},
                                                      {"library", plan::Choice::kLibrary}};

plan::Choice choice_of(const std::string& name) {
  const auto found = kChoices.find(name);
  if (found != kChoices.end()) return found->second;
  throw py::value_error("lora_ext: expected one of auto, hybrid, kernel, library, but got " + name);
}

#ifdef LORA_EXT_WITH_CUDA
void bind_device(py::module& m) {
  m.def(
      "cuda_card", [](const at::Device& device) { return kernel_launch::card_of(device); },
      py::arg("device"));
  m.def(
      "cuda_check_result",
      [](const at::Device& device, const plan::Plan& plan, bool backward,
         const at::ScalarType& dtype, bool float_adapters, bool dropout) {
        const std::string result = kernel_check::result(
            device, kernel_check::kernels_of(plan, backward, dtype, float_adapters, dropout));
        return result.empty() ? "passed" : result;
      },
      py::arg("device"), py::arg("plan"), py::arg("backward"), py::arg("dtype"),
      py::arg("float_adapters"), py::arg("dropout"));
  m.def("cuda_warmup", &kernel_route::warmup, py::arg("device"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "set_cuda_route", [](const std::string& name) { kernel_route::set_choice(choice_of(name)); },
      py::arg("name"));
  m.def("cuda_route", [] {
    for (const auto& [name, choice] : kChoices)
      if (choice == kernel_route::current_choice()) return name;
    return std::string("auto");
  });
}
#else
void bind_device(py::module&) {}
#endif

}  // namespace

void bind_plan(py::module& m) {
  py::class_<plan::Card>(m, "Card")
      .def(py::init<int, int, int64_t, int64_t>(), py::arg("arch"), py::arg("sms"),
           py::arg("shared_per_sm"), py::arg("shared_per_block"))
      .def_readonly("arch", &plan::Card::arch)
      .def_readonly("sms", &plan::Card::sms)
      .def_readonly("shared_per_sm", &plan::Card::shared_per_sm)
      .def_readonly("shared_per_block", &plan::Card::shared_per_block);
  py::class_<plan::Problem>(m, "Problem")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("m"), py::arg("n"), py::arg("k"),
           py::arg("rank"))
      .def_readwrite("half_dtype", &plan::Problem::half_dtype)
      .def_readwrite("float_adapters", &plan::Problem::float_adapters)
      .def_readwrite("dropout", &plan::Problem::dropout)
      .def_readwrite("weight_row_major", &plan::Problem::weight_row_major)
      .def_readwrite("aligned", &plan::Problem::aligned)
      .def_readwrite("aligned_weight", &plan::Problem::aligned_weight)
      .def_readwrite("aligned_a", &plan::Problem::aligned_a)
      .def_readwrite("aligned_b", &plan::Problem::aligned_b)
      .def_readwrite("need_dx", &plan::Problem::need_dx)
      .def_readwrite("need_dlora_a", &plan::Problem::need_dlora_a)
      .def_readwrite("need_dlora_b", &plan::Problem::need_dlora_b);
  py::class_<plan::Plan>(m, "Plan")
      .def_readonly("kernel", &plan::Plan::kernel)
      .def_readonly("hybrid", &plan::Plan::hybrid)
      .def_readonly("reason", &plan::Plan::reason)
      .def_readonly("workspace", &plan::Plan::workspace)
      .def_readonly("columns", &plan::Plan::columns)
      .def_readonly("panels", &plan::Plan::panels)
      .def_readonly("one_pass", &plan::Plan::one_pass)
      .def_property_readonly("tile", [](const plan::Plan& p) { return plan::name_of(p.gemm.tile); })
      .def_property_readonly("blocks", [](const plan::Plan& p) { return p.gemm.blocks; })
      .def_property_readonly("shrink_splits", [](const plan::Plan& p) { return p.shrink.splits; })
      .def_property_readonly("dlora_a_splits", [](const plan::Plan& p) { return p.dlora_a.splits; })
      .def_property_readonly("dlora_b_splits", [](const plan::Plan& p) { return p.dlora_b.splits; })
      .def("__str__", &plan::Plan::describe);
  const auto choice = py::arg("choice") = "auto";
  m.def(
      "plan_forward",
      [](const plan::Card& card, const plan::Problem& problem, const std::string& name) {
        return plan::forward(card, problem, choice_of(name));
      },
      py::arg("card"), py::arg("problem"), choice);
  m.def(
      "plan_backward",
      [](const plan::Card& card, const plan::Problem& problem, const std::string& name) {
        return plan::backward(card, problem, choice_of(name));
      },
      py::arg("card"), py::arg("problem"), choice);
  bind_device(m);
}

}  // namespace lora_ext
