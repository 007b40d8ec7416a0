"""What `make gpu` measures: cells, routes, replays, clocks, counters, bits that differ."""

import copy
from dataclasses import replace

import pytest
import torch
from bench_helpers import QUICK, small

import lora_ext
from benchmarks import calls, card, results, runner, shapes, variants
from benchmarks.gpu import (
    cases,
    cells,
    decode,
    mixture_ways,
    mixtures,
    pool_stress,
    profile,
    quantized,
    stress,
)
from benchmarks.problem import make_problem


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


def test_a_pool_that_changes_between_replays_agrees_with_a_loop():
    assert pool_stress.main(["--device", "cpu"]) == 0


@pytest.mark.parametrize("what", ["lora_a", "lora_b", "ranks", "scaling", "index"])
def test_a_replay_that_reads_what_was_there_before_is_seen(what, monkeypatch, capsys):
    """As a graph would that had copied a tensor when it was captured."""
    linear, kept = pool_stress.lora_linear, {}

    def stale(x, weight, lora_a, lora_b, bias, scaling, **words):
        now = {"lora_a": lora_a, "lora_b": lora_b, "scaling": scaling, **words}
        # The weight, too: another one must not come to its address.
        now[what] = kept.setdefault(weight.data_ptr(), (now[what].clone(), weight))[0]
        return linear(x, weight, bias=bias, **now)

    monkeypatch.setattr(pool_stress, "lora_linear", stale)
    assert pool_stress.main(["--device", "cpu"]) == 1
    assert "after " in capsys.readouterr().out


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
    assert mixtures.mixture_of(row).work()[0] > 0
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
    assert "lora_ext::lora" in names


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
