"""What `make gpu` measures: cells, routes, replays, clocks, counters, bits that differ."""

import json
import random
from dataclasses import replace

import pytest
import torch
from bench_helpers import QUICK, small

import lora_ext
from benchmarks import calls, card, results, runner, shapes, variants
from benchmarks.adapters import measure as many
from benchmarks.gpu import cases, cells, decode, pool_stress, profile, quantized, stress
from benchmarks.problem import make_problem
from lora_ext.nn.layer_pool import LayerPool


def test_a_cell_survives_the_json():
    cell = replace(small(), rank=3, bias=False)
    assert runner.cell_of({"cell": json.loads(json.dumps(cell.as_dict()))}) == cell


def test_cuda_cells_time_every_route_and_baseline():
    cell = shapes.Cell(shapes.STEP, "bfloat16", 8, 16, 16, device="cuda")
    names = set(variants.names_for(cell))
    peers = {"peft", "peft_default", "naive", "unsloth", "triton_pair", "loralib"}
    assert {*variants.ROUTES, *peers} <= names
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, device="cpu")))
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, dtype="float32")))


def test_the_cells_are_what_was_asked_for():
    headline, wide = cells.headline_cells(), cells.wide_cells()
    assert len(headline) <= cells.MOST_HEADLINES
    every = [*headline, *wide]
    assert len({cell.id for cell in every}) == len(every)
    assert {cell.mode for cell in every} == {shapes.FORWARD, shapes.BACKWARD, shapes.STEP}
    rows, ranks = {c.rows for c in every}, {c.rank for c in every}
    assert min(rows) == 1 and max(rows) == 8192 and {8, 16, 64, 128, 256} <= ranks
    for name in ("Llama-3.1 8B", "Llama-3.1 70B", "Qwen2.5 7B", "Mistral 7B", "GPT-2 medium"):
        mine = {(c.mode, c.dropout_p > 0) for c in every if name in c.layer}
        assert len(mine) >= 4, name
    assert all(cell.device == "cuda" for cell in every)
    for cell in cells.on_cpu(every):
        assert cell.device == "cpu" and cell.rows * cell.in_features <= 16 * 256


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


def test_what_cannot_be_captured_is_not_tried():
    def listed(problem, dropout_p):
        return replace(variants.naive(problem, dropout_p), no_graph="lists on the host")

    means = runner.Means(runner.CpuMeter(), lambda make: make())
    builders = {**variants.BUILDERS, "peft": listed}
    result = runner.run_cell(small(shapes.FORWARD), QUICK, builders=builders, means=means)
    assert result["notes"]["peft"] == "no graph: lists on the host"
    assert "peft" in result["timing"] and "peft" not in result["graph"]
    assert "merged" in result["graph"]


def test_batches_of_many_adapters_are_what_was_asked_for():
    chosen = cases.many_cases()
    assert len({case.id for case in chosen}) == len(chosen)
    first = chosen[0]
    size = (first.rows, first.adapters, first.width, first.rank, first.layout, first.dtype)
    assert size == (8192, 64, 4096, 16, "ranges", "bfloat16")
    assert first.mode == shapes.FORWARD and first.tokens == 128
    tables = {(c.mode, c.rows) for c in chosen if (c.adapters, c.width) == (32, 2048)}
    modes = (shapes.FORWARD, shapes.STEP)
    assert tables == {(mode, rows) for mode in modes for rows in (32, 256, 2048)}
    decoded = [c for c in chosen if c.group == "decode"]
    assert {c.rows for c in decoded} == {1, 2, 4, 8, 16, 32, 64}
    assert all(c.adapters == c.rows and c.capacity == 64 for c in decoded)
    assert {c.mode for c in chosen if c.layout == "mixed"} == set(modes)
    assert all((c.dropout_p > 0) == (c.mode == shapes.STEP) for c in chosen)
    assert all(c.device == "cuda" for c in chosen)
    small_ones = cases.on_cpu(chosen)
    assert all(c.device == "cpu" and c.rows * c.width <= 16 * 256 for c in small_ones)
    assert {c.group for c in small_ones} == {"headline", "decode"}
    for case in small_ones:
        row = many.measure(case, QUICK)
        assert row["status"] == "ok" and row["disagreements"] == {}, row


def test_a_pool_that_changes_between_replays_agrees_with_a_loop():
    assert pool_stress.main(["--device", "cpu"]) == 0


@pytest.mark.parametrize("what", ["lora_a", "lora_b", "ranks", "scaling", "index"])
def test_a_replay_that_reads_what_was_there_before_is_seen(what, monkeypatch, capsys):
    """As a graph would that had copied a tensor when it was captured."""
    linear = LayerPool.linear

    def stale(self, x, weight, bias, index):
        if what == "index":
            return linear(self, x, weight, bias, vars(self).setdefault("first", index.clone()))
        current = getattr(self, what)
        setattr(self, what, vars(self).setdefault("first", current.clone()))
        try:
            return linear(self, x, weight, bias, index)
        finally:
            setattr(self, what, current)

    monkeypatch.setattr(LayerPool, "linear", stale)
    assert pool_stress.main(["--device", "cpu"]) == 1
    assert "after " in capsys.readouterr().out


def test_every_kind_of_change_is_made():
    one, dice = pool_stress.served("cpu", (12, 24, 40), torch.float32), random.Random(0)
    with torch.no_grad():
        made = {pool_stress.change(one, dice).split()[0] for _ in range(60)}
    assert made == {"rows", "add", "replace", "write", "remove"}


def test_weights_in_four_bits_have_every_bit_and_steps_on_them_are_timed(monkeypatch, capsys):
    """With the formula for bitsandbytes' own kernels, which may not be there."""
    monkeypatch.setattr(quantized, "by_library", quantized.by_formula)
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: name)
    assert quantized.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "0 of 12 weights in NF4 differ from bitsandbytes" in said
    for what in ("dequantise", "dequantise by bitsandbytes", "step, dense", "step, NF4"):
        assert f"{what} " in said
    assert "step, bitsandbytes and PEFT" in said


def test_a_weight_in_four_bits_with_another_bit_is_said(monkeypatch, capsys):
    right = quantized.by_formula

    def wrong(weight, dtype):
        dense = right(weight, dtype)
        dense[-1, -1] += 1
        return dense

    monkeypatch.setattr(quantized, "by_formula", wrong)
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(quantized, "_TIMED", {"cpu": []})
    assert quantized.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "bitsandbytes is missing" in said and "1 values differ" in said
    assert "12 of 12 weights in NF4 differ from the formula" in said


def test_both_ways_of_a_step_in_four_bits_agree(monkeypatch):
    monkeypatch.setattr(quantized, "by_library", quantized.by_formula)
    one = quantized.problem(96, 40, "cpu")
    found = []
    factors = (one.lora_a, one.lora_b)
    ways = (
        one.by_peft,
        lambda: lora_ext.lora_linear(one.x, one.weight, *factors, scaling=quantized._SCALING),
    )
    for way in ways:
        one.step(way)()
        found.append([leaf.grad.float() for leaf in (one.x, *factors)])
    for one_grad, other in zip(*found, strict=True):
        assert (one_grad - other).abs().max() <= 2**-6 * other.abs().max()


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


NCU = """==PROF== Connected to process 77
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","77","lora_gemm_sm80","gpu__time_duration.sum","ns","351,200"
"0","77","lora_gemm_sm80","dram__bytes_read.sum","Mbyte","101.5"
"0","77","lora_gemm_sm80","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","%","88.2"
"1","77","lora_reduce","gpu__time_duration.sum","us","2.5"
"1","77","lora_reduce","dram__bytes_read.sum","","n/a"
"""


def test_what_ncu_says_is_read():
    gemm, reduce = profile.counters(NCU)
    assert gemm == {
        "kernel": "lora_gemm_sm80",
        "us": pytest.approx(351.2),
        "DRAM bytes read": 101.5e6,
        "tensor pipes busy, %": 88.2,
    }
    assert reduce == {"kernel": "lora_reduce", "us": 2.5}
    assert profile.counters("==ERROR== ERR_NVGPUCTRPERM") == []


def test_kernels_of_a_call_are_listed(tmp_path):
    cell = replace(small(shapes.FORWARD), device="cpu")
    names = [name for name, _ in profile.kernels_of(cell, "ours")]
    assert "lora_ext::lora_linear" in names


def test_a_bit_that_differs_is_counted():
    def changing(device, seed):
        calls = iter(range(10**6))
        return lambda: (torch.tensor([seed, 1 if next(calls) == 3 else 0]),)

    assert stress.replays("cpu", 5, changing) == 1
    assert stress.side_by_side("cpu", 5, changing) == stress._WORKERS
    assert stress.main(["--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("route", "place", "status"),
    [("kernel", 0, 1), ("hybrid", 3, 1), ("hybrid", 0, 0), ("library", 0, 0), ("library", 3, 0)],
)
def test_only_what_our_kernels_make_owes_equal_bits(monkeypatch, capsys, route, place, status):
    """One tensor of one route differs; the others are those of the CPU's steps."""

    def step_of(device, seed, sizes):
        calls = iter(range(10**6))

        def step():
            found = [torch.zeros(1) for _ in range(4)]
            found[place] += current[0] == route and next(calls) % 3 == 2
            return tuple(found)

        return step

    current = [""]
    monkeypatch.setattr(stress, "step_of", step_of)
    monkeypatch.setattr(
        stress.lora_ext.kernels, "set_cuda_route", lambda name: current.insert(0, name)
    )
    monkeypatch.setattr(stress, "ROUTES", {"cpu": ("kernel", "hybrid", "library")})
    assert stress.main(["--device", "cpu"]) == status
    assert "for information" in capsys.readouterr().out


def test_few_rows_are_compared_and_timed(capsys):
    assert decode.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "0 of 16 calls of few rows are wrong; K=N=128, 4 rows: base alone " in said
    for what in ("one adapter", "one each", "library route", "PEFT"):
        assert f"{what} " in said


@pytest.mark.parametrize(
    ("found", "words"), [("off", "elements are off"), ("another", "a replay has other bits")]
)
def test_few_rows_that_are_wrong_are_said(found, words, monkeypatch, capsys):
    right, calls = decode.Problem.one, []

    def one(self):
        calls.append(1)
        y = right(self)
        if found == "off" or len(calls) % 2 == 0:
            y[0, 0] += (1 if found == "off" else 2**-7) * y[0, 0].abs()
        return y

    monkeypatch.setattr(decode.Problem, "one", one)
    monkeypatch.setattr(decode, "_TIMED", {"cpu": []})
    monkeypatch.setattr(decode, "timed", lambda device: "")
    assert decode.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert words in said and "8 of 16 calls of few rows are wrong" in said
