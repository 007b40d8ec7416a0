#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <map>

#include "kernels/device.h"
#include "kernels/plan/autotune_cache.h"
#include "kernels/plan/plan.h"
#include "kernels/plan/predict.h"
#include "op/bindings/bindings.h"
#include "op/launch/kernel_launch.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

namespace py = pybind11;

const std::map<std::string, plan::Choice> kChoices = {{"auto", plan::Choice::kAuto},
                                                      {"kernel", plan::Choice::kKernel},
                                                      {"hybrid", plan::Choice::kHybrid},
                                                      {"library", plan::Choice::kLibrary}};

plan::Plan plan_for(const plan::Card& card, const plan::Problem& problem,
                    const std::string& choice) {
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  return plan::make_plan(card, problem,
                         autotune::request_for(card, problem, choice_of(choice), deterministic));
}

kernel_route::Explained explain_forward(const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& lora_a, const at::Tensor& lora_b,
                                        double dropout_p) {
  return kernel_route::explain(
      ForwardArgs{x, Base{weight}, Update::one(lora_a, lora_b, 1.0, DropoutArgs{dropout_p})});
}

// If grad is not given, a contiguous gradient of y is assumed.
kernel_route::Explained explain_backward(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& lora_a, const at::Tensor& lora_b,
                                         double dropout_p, const std::optional<at::Tensor>& grad) {
  const at::Tensor contiguous = at::empty({0, weight.size(0)}, x.options());
  return kernel_route::explain(
      BackwardArgs{grad ? *grad : contiguous,
                   x,
                   Base{weight},
                   Update::one(lora_a, lora_b, 1.0, DropoutArgs{dropout_p}),
                   {},
                   Wanted::one(true, true, true)});
}

void bind_device(py::module& m) {
  m.def("cuda_card", &kernel_launch::card_of, py::arg("device"));
  m.def("cuda_driver", &cuda::driver);
  py::class_<kernel_route::Explained>(m, "Explained")
      .def_readonly("plan", &kernel_route::Explained::plan)
      .def_readonly("check", &kernel_route::Explained::check);
  m.def("explain_forward", &explain_forward, py::arg("x"), py::arg("weight"), py::arg("lora_a"),
        py::arg("lora_b"), py::arg("dropout_p"));
  m.def("explain_backward", &explain_backward, py::arg("x"), py::arg("weight"), py::arg("lora_a"),
        py::arg("lora_b"), py::arg("dropout_p"), py::arg("grad") = py::none());
  m.def("explain_problem", &kernel_route::explain_problem, py::arg("device"), py::arg("problem"));
  m.def(
      "set_cuda_route",
      [](const std::string& name) { kernel_route::settings().choice = choice_of(name); },
      py::arg("name"));
  m.def(
      "set_pdl", [](bool enabled) { kernel_route::settings().use_pdl = enabled; },
      py::arg("enabled"));
  m.def("use_pdl", [] { return kernel_route::settings().use_pdl.load(); });
  m.def(
      "set_reserved_sms", [](int count) { kernel_route::settings().reserved_sms = count; },
      py::arg("count"));
  m.def("cuda_route", [] {
    for (const auto& [name, choice] : kChoices)
      if (choice == kernel_route::settings().choice) return name;
    return std::string("auto");
  });
}

autotune::Entry autotune_entry(bool backward, bool float_adapters, bool dropout, int64_t rows,
                               int64_t n, int64_t k, int64_t rank, const std::string& route,
                               const std::string& tile, const std::string& measured) {
  const plan::Choice choice = choice_of(route);
  const std::optional<plan::Tile> asked = plan::tile_named(tile);
  if (choice == plan::Choice::kAuto) throw py::value_error("lora_ext: auto is no route");
  if (!tile.empty() && !asked) throw py::value_error("lora_ext: there is no tile " + tile);
  return {{backward, float_adapters, dropout, n, k, rank}, rows, {choice, asked, measured}};
}

void bind_autotune_cache(py::module& m) {
  py::class_<autotune::Entry>(m, "AutotuneEntry")
      .def(py::init(&autotune_entry), py::kw_only(), py::arg("backward"), py::arg("float_adapters"),
           py::arg("dropout"), py::arg("rows"), py::arg("out_features"), py::arg("in_features"),
           py::arg("rank"), py::arg("route"), py::arg("tile"), py::arg("measured"));
  m.def("replace_autotune_cache", &autotune::replace, py::arg("card"), py::arg("entries"));
  m.def(
      "tiles_of",
      [](const plan::Card& card, bool backward, bool float_adapters, bool dropout) {
        std::vector<std::string> names;
        for (const plan::Tile tile : plan::tiles_of(card, {backward, float_adapters, dropout}))
          names.emplace_back(plan::facts_of(tile).name);
        return names;
      },
      py::arg("card"), py::kw_only(), py::arg("backward"), py::arg("float_adapters"),
      py::arg("dropout"));
}

void bind_prediction(py::module& m) {
  py::class_<plan::Sustained>(m, "Sustained")
      .def_readonly("tflops", &plan::Sustained::tflops)
      .def_readonly("mma_share", &plan::Sustained::mma_share)
      .def_readonly("dram_gb_s", &plan::Sustained::dram_gb_s)
      .def_readonly("launch_us", &plan::Sustained::launch_us);
  py::class_<plan::Launch>(m, "Launch")
      .def(py::init([](double bytes, double flop, double share, int64_t blocks) {
             return plan::Launch{"", bytes, flop, share, blocks};
           }),
           py::arg("bytes"), py::arg("flop") = 0.0, py::arg("share") = 1.0, py::arg("blocks") = 1)
      .def_property_readonly("name", [](const plan::Launch& l) { return std::string(l.name); })
      .def_readonly("bytes", &plan::Launch::bytes)
      .def_readonly("flop", &plan::Launch::flop)
      .def_readonly("share", &plan::Launch::share)
      .def_readonly("blocks", &plan::Launch::blocks)
      .def_readonly("launches", &plan::Launch::launches)
      .def_readonly("host_us", &plan::Launch::host_us)
      .def("us", &plan::Launch::us, py::arg("card"));
  m.def("sustained_by", &plan::sustained_by, py::arg("card"));
  m.def(
      "library_product",
      [](const plan::Card& card, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
        const Dtype dtype = plan::Problem{}.dtype;
        return plan::library_product(card, dtype, "", rows, columns, depth, accumulate);
      },
      py::arg("card"), py::arg("rows"), py::arg("columns"), py::arg("depth"),
      py::arg("accumulate") = false);
  m.def("predicted_launches", &plan::launches_of, py::arg("plan"));
  m.attr("host_us") = std::map<std::string, double>{{"call", plan::kHostCallUs},
                                                    {"launch", plan::kHostLaunchUs},
                                                    {"library", plan::kHostLibraryUs},
                                                    {"allocation", plan::kHostAllocationUs}};
}

// The result of `get` for a tiled plan; 0 for others.
template <class Get>
auto of_tiled(const Get& get) {
  return [get](const plan::Plan& p) {
    using Number = decltype(get(*p.tiled()));
    return p.tiled() != nullptr ? get(*p.tiled()) : Number{};
  };
}

// The tile of lora_gemm or of lora_decode; the smallest if the plan has no product.
plan::Tile tile_of(const plan::Plan& p) {
  if (p.decode() != nullptr) return plan::Tile::kDecode;
  const bool has_gemm = p.tiled() != nullptr && p.tiled()->gemm;
  return has_gemm ? p.tiled()->gemm->tile : plan::Tile::k128x64;
}

int blocks_of(const plan::Plan& p) {
  if (p.decode() != nullptr) return p.decode()->blocks;
  return p.tiled() != nullptr && p.tiled()->gemm ? p.tiled()->gemm->blocks : 0;
}

int columns_of(const plan::Plan& p) {
  if (p.decode() != nullptr) return p.decode()->terms * p.decode()->width;
  return p.tiled() != nullptr ? p.tiled()->columns : 0;
}

void bind_plans(py::module& m) {
  using plan::Plan;
  using plan::Tiled;
  py::class_<Plan>(m, "Plan")
      .def_readonly("reason", &Plan::reason)
      .def_readonly("workspace", &Plan::workspace)
      .def_property_readonly("kernel", &Plan::has_kernels)
      .def_property_readonly("hybrid", &Plan::hybrid)
      .def_property_readonly(
          "predicted_us",
          [](const Plan& p) { return std::map(p.predicted_us.begin(), p.predicted_us.end()); })
      .def_property_readonly("tile", [](const Plan& p) { return plan::facts_of(tile_of(p)).name; })
      .def_property_readonly("wgmma",
                             [](const Plan& p) { return plan::facts_of(tile_of(p)).wgmma; })
      .def_property_readonly("blocks", &blocks_of)
      .def_property_readonly("columns", &columns_of)
      .def_property_readonly("one_pass", of_tiled([](const Tiled& t) { return t.one_pass(); }))
      .def_property_readonly("panels", of_tiled([](const Tiled& t) { return t.panels; }))
      .def_property_readonly("wgrad_uses_pdl",
                             of_tiled([](const Tiled& t) { return t.wgrad_uses_pdl; }))
      .def_property_readonly("shrink_splits",
                             of_tiled([](const Tiled& t) { return t.shrink.splits; }))
      .def_property_readonly("dlora_a_splits",
                             of_tiled([](const Tiled& t) { return t.dlora_a.splits; }))
      .def_property_readonly("dlora_b_splits",
                             of_tiled([](const Tiled& t) { return t.dlora_b.splits; }))
      .def("__str__", &Plan::describe);
  const auto choice = py::arg("choice") = "auto";
  m.def("plan_forward", &plan_for, py::arg("card"), py::arg("problem"), choice);
  m.def(
      "plan_backward",
      [](const plan::Card& card, plan::Problem problem, const std::string& name) {
        problem.backward = true;
        return plan_for(card, problem, name);
      },
      py::arg("card"), py::arg("problem"), choice);
}

}  // namespace

plan::Choice choice_of(const std::string& name) {
  const auto found = kChoices.find(name);
  if (found != kChoices.end()) return found->second;
  throw py::value_error("lora_ext: expected one of auto, hybrid, kernel, library, but got " + name);
}

void bind_plan(py::module& m) {
  py::class_<plan::Card>(m, "Card")
      .def(py::init<int, int, int64_t, int64_t, std::string, bool, bool, std::string>(),
           py::arg("arch"), py::arg("sms"), py::arg("shared_per_sm"), py::arg("shared_per_block"),
           py::arg("name") = "", py::arg("tensor_maps") = true, py::arg("sm90a_code") = true,
           py::arg("error") = "")
      .def_readonly("error", &plan::Card::error)
      .def_readonly("name", &plan::Card::name)
      .def_readonly("arch", &plan::Card::arch)
      .def_readonly("sms", &plan::Card::sms)
      .def_readonly("shared_per_sm", &plan::Card::shared_per_sm)
      .def_readonly("shared_per_block", &plan::Card::shared_per_block);
  py::class_<plan::Problem>(m, "Problem")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("m"), py::arg("n"), py::arg("k"),
           py::arg("rank"))
      .def_readonly("m", &plan::Problem::m)
      .def_readonly("n", &plan::Problem::n)
      .def_readonly("k", &plan::Problem::k)
      .def_readonly("rank", &plan::Problem::rank)
      .def_property(
          "dtype", [](const plan::Problem& p) { return scalar_type_of(p.dtype); },
          [](plan::Problem& p, at::ScalarType dtype) { p.dtype = dtype_of(dtype); })
      .def_readwrite("float_adapters", &plan::Problem::float_adapters)
      .def_readwrite("dropout", &plan::Problem::dropout)
      .def_readwrite("given_base", &plan::Problem::given_base)
      .def_readwrite("weight_row_major", &plan::Problem::weight_row_major)
      .def_property_readonly("groups",
                             [](const plan::Problem& p) { return p.groups ? p.groups->count : 0; })
      .def_property_readonly("own_weights", &plan::Problem::own_weights)
      .def_readwrite("aligned", &plan::Problem::aligned)
      .def_readwrite("aligned_weight", &plan::Problem::aligned_weight)
      .def_readwrite("aligned_a", &plan::Problem::aligned_a)
      .def_readwrite("aligned_b", &plan::Problem::aligned_b)
      .def_readwrite("factor_rows", &plan::Problem::factor_rows)
      .def_readwrite("need_dx", &plan::Problem::need_dx)
      .def_readwrite("need_dlora_a", &plan::Problem::need_dlora_a)
      .def_readwrite("need_dlora_b", &plan::Problem::need_dlora_b);
  bind_plans(m);
  bind_prediction(m);
  bind_autotune_cache(m);
  bind_device(m);
}

}  // namespace lora_ext
