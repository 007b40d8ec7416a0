"""What `make gpu` measures, and what becomes of it: predictions, report, keeping."""

import copy
import runpy
from dataclasses import replace

import pytest
import torch
from bench_helpers import MACHINE, QUICK, measured_run, small, synthetic_case

import lora_ext
from benchmarks import calls, card, report, results, runner, shapes, variants
from benchmarks.gpu import (
    cases,
    cells,
    gpu_targets,
    mixture_ways,
    mixtures,
    predicted,
    profile,
    quantized,
)
from benchmarks.gpu.document import document_of
from benchmarks.gpu.process import ROOT
from benchmarks.problem import make_problem
from lora_ext import _C
from lora_ext.kernels import CARDS


def test_cuda_cells_time_every_route_and_baseline():
    cell = shapes.Cell(shapes.STEP, "bfloat16", 8, 16, 16, device="cuda")
    names = set(variants.names_for(cell))
    peers = {"peft", "peft_default", "naive", "unsloth", "loralib"}
    assert {*variants.ROUTES, *peers} <= names
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, device="cpu")))
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, dtype="float32")))


def test_no_two_cells_or_cases_share_a_name():
    """What has a name that is known counts as measured when a run goes on."""
    of_layers = [*cells.headline_cells(), *cells.wide_cells()]
    for every in (of_layers, cases.many_cases(), mixtures.mixtures()):
        assert len({one.id for one in every}) == len(every) > 10


def test_backward_alone_gives_the_gradients_of_a_step():
    cell = small(shapes.BACKWARD, dropout_p=0.0)
    problem = make_problem(cell)
    expected = {}
    for name in ("naive", "ours", "peft"):
        variant = variants.BUILDERS[name](problem, 0.0)
        call = calls.call_of(variant, problem, shapes.BACKWARD)
        for _ in range(len(problem.inputs) + 1):  # each output is kept for the next round
            call()
        assert problem.inputs[0].grad is None
        x, grad = problem.inputs[0], problem.grads[0]
        found = torch.autograd.grad(variant.call(x), (x, *variant.adapters), grad)
        expected.setdefault("naive", found)
        for one, other in zip(found, expected["naive"], strict=True):
            torch.testing.assert_close(one, other)
    result = runner.run_cell(cell, QUICK)
    assert result["status"] == "ok", result
    assert {"frozen", "ours", "peft", "naive"} <= set(result["timing"])


class Refuses(torch.autograd.Function):
    """Its backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward")


@pytest.mark.parametrize("mode", [shapes.FORWARD, shapes.STEP, shapes.BACKWARD])
def test_a_route_holds_for_each_call_and_leaves_nothing_behind(monkeypatch, mode):
    """On the CPU, which has no routes: of the calls that would set them."""
    current, seen = ["auto"], []
    monkeypatch.setattr(lora_ext.kernels, "set_cuda_route", lambda name: current.append(name))
    problem = make_problem(small(mode))
    variant = variants.ours(problem, 0.0)
    plain = variant.call
    variant.route = "kernel"
    variant.call = lambda x: (seen.append(current[-1]), plain(x))[1]
    call = calls.call_of(variant, problem, mode)
    with torch.set_grad_enabled(mode != shapes.FORWARD):
        for _ in range(5):
            call()
            assert current[-1] == "auto"
    assert seen and set(seen) == {"kernel"}
    assert not any(x._backward_hooks for x in problem.inputs)
    if mode == shapes.FORWARD:
        return
    variant.call = lambda x: Refuses.apply(plain(x))
    with pytest.raises(RuntimeError, match="no backward"):
        calls.call_of(variant, problem, mode)()
    assert current[-1] == "auto"


def test_replays_take_turns_with_calls_and_what_cannot_be_captured_has_a_note():
    order = []

    def capture(make):
        function = make()
        if len(order) == 0:
            order.append("first")
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: (order.append("replay"), function())

    readings = iter([{"clocks.sm": 1980.0}, {"clocks.sm": 1755.0}])
    means = runner.Means(runner.CpuMeter(), capture, lambda: next(readings))
    result = runner.run_cell(small(shapes.FORWARD), QUICK, means=means)
    assert result["status"] == "ok" and "replay" in order
    assert "merged" in result["timing"] and "merged" not in result["graph"]
    assert "no graph: RuntimeError: operation not permitted" in result["notes"]["merged"]
    assert {"ours", "naive"} <= set(result["graph"])
    assert result["card"] == {"before": {"clocks.sm": 1980.0}, "after": {"clocks.sm": 1755.0}}
    assert results.ratio(result, "ours", "naive", "graph") is not None


def a_layer(name, mode=shapes.STEP, **fields):
    [cell, *_] = mixtures.on_cpu([mixtures.Mixture(name, mode, 16, **fields)])
    return cell


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Qwen3-30B-A3B", {"base": mixtures.NF4}),
        ("Mixtral 8x7B", {"dtype": "float16"}),
        ("gpt-oss-20b", {}),
        ("gpt-oss-20b", {"mode": shapes.FORWARD}),
    ],
)
def test_experts_agree_with_float64_and_are_timed(name, fields):
    pytest.importorskip("transformers")
    row = mixture_ways.measure(a_layer(name, **fields), QUICK)
    assert row["status"] == "ok" and row["disagreements"] == row["errors"] == {}, row
    of_peft = set() if fields.get("base") else {"peft", "peft_default"}
    assert set(row["timing"]) == {"frozen", "ours", "ours_fp32", *of_peft}
    assert set(row["notes"]) == {*mixture_ways.BUILDERS} - set(row["timing"])


@pytest.mark.parametrize(
    ("way", "place", "status", "said"),
    [
        ("ours", 0, "wrong", "out"),
        ("ours_fp32", 3, "wrong", "dlora_b of down"),
        ("peft", 4, "ok", "dweights"),
        ("frozen", 4, "wrong", "dweights"),
    ],
)
def test_a_layer_of_experts_that_is_wrong_is_named_and_not_timed(
    way, place, status, said, monkeypatch
):
    """With another expert's factors, or gradients of something else."""
    pytest.importorskip("transformers")
    build = mixture_ways.BUILDERS[way]

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.roll(1, -1)

    def wrong(problem):
        problem, made, leaves = copy.copy(problem), problem.leaves, ()

        def planted(*words, **more):
            nonlocal leaves
            leaves = made(*words, **more)
            given = list(leaves)
            at = min(place, len(given) - 1)
            given[at] = given[at].roll(1, 0) if place == 0 else Other.apply(given[at])
            return tuple(given)

        problem.leaves = planted
        return replace(build(problem), adapters=leaves)

    monkeypatch.setitem(mixture_ways.BUILDERS, way, wrong)
    row = mixture_ways.measure(a_layer("Mixtral 8x7B"), QUICK)
    assert list(row["disagreements"]) == [way] and row["status"] == status
    assert row["disagreements"][way][0].startswith(said)
    assert way not in row["timing"] and row["notes"][way] == "not timed: it is wrong"


def in_nf4(mode):
    [case] = quantized.on_cpu([quantized.QuantizedCase(mode, 64, 4096)])
    return quantized.measure(case, QUICK)


@pytest.mark.parametrize("mode", [shapes.FORWARD, shapes.STEP])
@pytest.mark.parametrize("library", [True, False])
def test_weights_in_four_bits_have_every_bit_and_are_timed(monkeypatch, mode, library):
    """With the formula for bitsandbytes' own kernels, which may not be there."""

    def missing(weight, dtype):
        raise variants.Unavailable("bitsandbytes is missing")

    monkeypatch.setattr(quantized, "by_library", quantized.by_formula if library else missing)
    row = in_nf4(mode)
    assert row["status"] == "ok" and row["disagreements"] == row["errors"] == {}, row
    assert set(row["timing"]) == {"dense", "ours", *(["peft"] if library else [])}


def test_a_weight_in_four_bits_with_another_bit_is_wrong(monkeypatch):
    right = quantized.by_formula

    def wrong(weight, dtype):
        dense = right(weight, dtype)
        dense[-1, -1] += 1
        return dense

    monkeypatch.setattr(quantized, "by_library", wrong)
    row = in_nf4(shapes.FORWARD)
    assert row["status"] == "wrong" and len(row["disagreements"]["ours"]) == 6
    assert "nested False: 1 values differ from bitsandbytes" in row["disagreements"]["ours"][0]


def test_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980, 2619, 312.44, 51, P0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = card.readings()
    assert (
        found["clocks.sm"] == 1980.0 and found["power.draw"] == 312.44 and found["pstate"] == "P0"
    )
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert card.readings() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert card.readings() is None


def test_kernels_of_a_call_are_listed():
    cell = replace(small(shapes.FORWARD), device="cpu")
    names = [name for name, _ in profile.kernels_of(cell, "ours")]
    assert "lora_ext::lora" in names


H100 = {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3", "device": "cuda"}


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("mode", [shapes.FORWARD, shapes.BACKWARD, shapes.STEP])
def test_predictions_are_the_planners(name, mode):
    card = CARDS[name]
    # So many rows that the device takes longer than the host, which replays of graphs have not.
    cell = shapes.Cell(mode, "bfloat16", 4096, 4096, 4096, rank=16, bias=False)
    problem = _C.Problem(4096, 4096, 4096, 16)
    plans = [] if mode == shapes.BACKWARD else [_C.plan_forward(card, problem)]
    plans += [] if mode == shapes.FORWARD else [_C.plan_backward(card, problem)]
    for variant, route in (("ours_kernel", "kernel"), ("ours_library", "library")):
        expected = sum(plan.predicted_us[route] for plan in plans)
        found = sum(us for _, us in predicted.launches_of(card, cell, variant))
        assert found == pytest.approx(expected)
    assert [us for _, us in predicted.launches_of(card, cell, "frozen")] != []
    assert predicted.launches_of(card, replace(cell, dtype="float32"), "ours") == []
    assert predicted.launches_of(card, cell, "peft") == []


def test_predictions_stand_beside_replays_and_the_furthest_comes_first():
    document = document_of(H100, measured_run())
    entries = document["predictions"]
    names = {entry["variant"] for entry in entries}
    assert {"merged", "ours", "ours_kernel"} <= names and "peft_default" not in names
    assert entries[0]["measured_us"] == pytest.approx(900.0)  # a replay goes before a call
    ours = [entry for entry in entries if entry["variant"].startswith("ours")]
    worst = max(ours, key=lambda entry: entry["measured_us"] / entry["predicted_us"])
    chosen = profile.furthest(document["cells"], H100["gpu"])
    assert len(chosen) == 3
    assert (chosen[0][0].id, chosen[0][1]) == (worst["cell"], worst["variant"])
    assert predicted.card_named("NVIDIA A100-SXM4-40GB") is CARDS["A100"]
    assert predicted.predictions(document["cells"], "Tesla V100") == []


def test_the_report_has_every_part_and_what_is_red(tmp_path):
    found = measured_run()
    kernels = [["lora_gemm_sm80", 351.2], ["lora_reduce", 2.5]]
    call = {"cell": "a cell", "variant": "ours", "kernels": kernels}
    call["predicted"] = [["lora_gemm", 340.0]]
    lost = {"error": "stopped after 60 s", "tail": ["in a kernel"], "stage": "profile"}
    found["profile"] = {
        "": {"name": "", "status": "done", "seconds": 1.0, "total": 2, "summary": ""},
        "a": {"name": "a", "status": "ok", **call},
        "b": {"name": "b", "status": "failed", **lost},
    }
    found["headline"]["0"]["entry"]["card"] = {
        "before": {"clocks.sm": 1980.0},
        "after": {"clocks.sm": 1755.0},
    }
    layers = [row["entry"] for row in found["mixtures"].values() if row["name"]]
    layers[0] |= {"status": "wrong", "disagreements": {"ours": ["out is off"]}}
    path = tmp_path / "results.json"
    results.write(document_of(H100, found), path)
    assert report.main([str(path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for said in (
        "| profile   | failed |  1 s | 1 ok 1 failed of 2; b: stopped after 60 s |",
        "- profile, b: failed: stopped after 60 s\n      in a kernel",
        "measured / predicted",
        "## Backward, as a multiple of frozen, graph replays (GPU)",
        "## Many adapters, step (GPU)",
        "## NF4, step (GPU)",
        "Qwen3-30B-A3B step bf16 4096 tokens r=16: ours DISAGREES with float64: out is off",
        "lora_gemm 340.0",
        "1755.0",
    ):
        assert said in text, said


@pytest.mark.parametrize(("ours", "verdict"), [(1.04, "pass"), (1.06, "miss")])
def test_the_forward_of_many_adapters_has_a_target(ours, verdict):
    document = document_of(H100, measured_run())
    first = document["adapters"][0]
    times = {"merged": 1.0, "ours_offs": ours}
    first["graph"] = synthetic_case(cases.many_cases()[0], times)["timing"]
    [row] = gpu_targets.evaluate(document)
    assert (row["verdict"], row["measured"]) == (verdict, ours) and "replays" in row["note"]
    del first["graph"]
    assert gpu_targets.evaluate(document)[0]["measured"] == 1.04
    first["timing"]["ours"]["disturbed"] = True
    assert gpu_targets.evaluate(document)[0]["verdict"] == "not measured"
    first["status"] = "wrong"
    assert gpu_targets.evaluate(document)[0]["verdict"] == "not measured"
    assert gpu_targets.evaluate({**document, "machine": MACHINE}) == []


def test_results_are_kept_where_the_repository_looks_for_them(tmp_path):
    places = runpy.run_path(str(ROOT / "scripts" / "keep_gpu_results.py"))["places"]
    folder, root = tmp_path / "out", tmp_path / "root"
    results.write(document_of(H100, measured_run()), folder / "results.json")
    for name in ("report.md", "forward.png", "golden/h100.json", "tuning/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    found = {str(target.relative_to(root)) for target in places(folder, "h100", root).values()}
    assert found == {
        "benchmarks/results/h100/gpu/results.json",
        "benchmarks/results/h100/gpu/report.md",
        "benchmarks/results/h100/gpu/forward.png",
        "emulator/conformance/golden/h100.json",
        "benchmarks/results/h100/gpu/a.json",
    }
    with pytest.raises(ValueError, match="expected a name like"):
        places(folder, "../h100")
    results.write(document_of(MACHINE, measured_run()), folder / "results.json")
    with pytest.raises(ValueError, match="trial on a CPU"):
        places(folder, "cpu")
