"""The benchmark program itself: what it checks, keeps, drops and reports. No timing is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import agreement, memory, real_model, report, results, runner, shapes, variants
from benchmarks.__main__ import chosen_cells
from benchmarks.machine import missing_device
from benchmarks.problem import make_problem
from benchmarks.targets import MISS, PASS, TARGETS, UNKNOWN, evaluate
from benchmarks.timing import CpuMeter, Plan, Sample, Timing, interleaved, wait_reader

QUICK = Plan(min_rounds=3, max_rounds=3, seconds=0.0, batch_ms=0.1, max_wait=1.0, warmup_ms=0.1)
MACHINE = {
    "name": "a machine",
    "device": "cpu",
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "memory_gib": 8.0,
    "gpu": None,
    "os": "Linux x86_64",
    "versions": {"torch": torch.__version__},
    "lora_ext": {"version": "0"},
    "torch_cpu_capability": "AVX2",
    "date": "2000-01-01T00:00:00+00:00",
    "disturbance_source": "none",
}


def small(mode=shapes.STEP, dtype="float32", **fields):
    return shapes.Cell(mode, dtype, 5, 24, 32, rank=4, **fields)


def without(*names):
    """The builders, with these variants failing as if they were not installed."""

    def absent(problem, dropout_p):
        raise ImportError("not installed")

    return {**variants.BUILDERS, **dict.fromkeys(names, absent)}


SLOW_TO_IMPORT = ("peft", "peft_default", "loralib")


def test_tiny_run_renders_report(tmp_path):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)
    cells = [
        small(),
        small(shapes.FORWARD, "bfloat16", dropout_p=0.05),
        *shapes.call_cells(),
    ]
    runner.run(cells, document, path, QUICK)
    document["targets"] = evaluate(document)
    results.write(document, path)
    assert [r["status"] for r in document["cells"]] == ["ok"] * 4, document["cells"]
    assert {"frozen", "ours", "peft", "naive", "loralib", "unsloth"} <= set(
        document["cells"][0]["timing"]
    )
    assert "peft_default" in document["cells"][1]["timing"]
    assert report.main([str(path)]) == 0
    text = (tmp_path / "report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles and all("CPU" in title for title in titles)
    assert "24x32 fp32 M=5 r=4" in text
    assert "a call, ours / PEFT" in text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    document = results.new_document("full", MACHINE)
    for rank in (8, 16):
        cell = replace(shapes.square(shapes.STEP, "float32", 1024, 16), rank=rank)
        document["cells"].append(synthetic(cell, {"frozen": 1.0, "ours": 1.1, "peft": 1.2}))
    assert plots.draw(document, tmp_path, "CPU") == ["step.png", "memory.png", "grid.png"]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_json_stays_valid(tmp_path):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)

    def interrupt(cells):
        yield cells[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run([small(), small(shapes.FORWARD)], document, path, QUICK, progress=interrupt)
    read = results.read(path)
    assert not read["complete"]
    assert [r["cell"]["id"] for r in read["cells"]] == [small().id]
    assert "(incomplete)" in report.text(read)


def test_failed_write_keeps_the_previous_document(tmp_path):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)
    results.write(document, path)
    with pytest.raises(ValueError, match="JSON"):
        results.write({**document, "cells": [float("nan")]}, path)
    assert results.read(path) == document


def test_other_schema_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": results.SCHEMA, "schema_version": 0}))
    with pytest.raises(ValueError, match="expected lora_ext"):
        results.read(path)


def test_disturbed_rounds_are_dropped_and_retried():
    waited = iter([0, 10**15, 10**15, 10**15])  # the first batch waits, the next one does not
    meter = CpuMeter(read_wait_ns=lambda: next(waited))
    timing = Timing(inner=1, batch_s=0.0)
    plan = Plan(min_rounds=1, max_rounds=1, max_wait=0.03)
    interleaved({"a": lambda: None}, {"a": timing}, meter, plan)
    assert (len(timing.clean), len(timing.dropped)) == (1, 1)
    assert not Timing(1, 0.0, [1.0] * 3, [9.0]).summary()["disturbed"]
    assert Timing(1, 0.0, [1.0] * 3, [9.0]).summary()["ms"] == 1.0


def test_always_disturbed_ends_and_is_flagged():
    clock = iter(range(10**6))  # one second at each look
    timing = Timing(inner=1, batch_s=0.1)
    plan = Plan(min_rounds=3, seconds=2.0, patience=2.0)
    interleaved(
        {"a": lambda: None},
        {"a": timing},
        lambda function, inner: Sample(1.0, 0.5),
        plan,
        now=lambda: float(next(clock)),
    )
    assert timing.clean == []
    summary = timing.summary()
    assert summary["disturbed"] and summary["n"] == 0 and summary["ms"] == 1.0


def test_wait_reader_grows():
    _, read = wait_reader()
    first = read()
    assert isinstance(first, int) and read() >= first


def test_peak_and_saved_bytes_equal_hand_computed():
    x = torch.randn(1000)
    # The sum takes 4000 bytes and lives on while the product takes another 4000.
    assert memory.peak_bytes(lambda: (x + x) * x) == 8000
    w = torch.randn(64, 32)
    rows = torch.randn(16, 32, requires_grad=True)
    # The output is 16 x 64 floats; backward adds the gradient of the same shape as x.
    grad = torch.randn(16, 64)

    def clear():
        rows.grad = None

    def step():
        torch.nn.functional.linear(rows, w).backward(grad)

    assert memory.peak_bytes(step, prepare=clear) == 4 * (16 * 64 + 16 * 32)
    assert memory.saved_bytes(lambda: torch.nn.functional.linear(rows, w), [w]) == 0
    w.requires_grad_()
    assert memory.saved_bytes(lambda: torch.nn.functional.linear(rows, w), [w]) == 4 * 16 * 32


def synthetic(cell, times, peaks=None):
    """A result in which every round takes the same time: ms of each variant."""
    timing = {
        name: {
            "ms": ms,
            "p25": ms,
            "p75": ms,
            "n": 5,
            "dropped": 0,
            "disturbed": False,
            "inner": 1,
            "samples": [ms] * 5,
        }
        for name, ms in times.items()
    }
    peaks = peaks or dict.fromkeys(times, 1 << 20)
    taken = {name: {"peak": peak, "saved": 0} for name, peak in peaks.items()}
    return {
        "cell": cell.as_dict(),
        "status": "ok",
        "errors": {},
        "notes": {},
        "timing": timing,
        "memory": taken,
    }


def test_targets_pass_and_miss():
    forward = shapes.square(shapes.FORWARD, "float32", 4096, 2048)
    step = shapes.square(shapes.STEP, "bfloat16", 1024, 2048, dropout_p=shapes.DROPOUT)
    document = results.new_document("headline", MACHINE)
    document["cells"] = [
        synthetic(forward, {"merged": 100.0, "ours": 103.0, "ours_packed": 86.0, "peft": 102.0}),
        synthetic(
            step,
            {"frozen": 10.0, "ours": 11.0, "peft": 20.0, "peft_default": 9.0},
            {"frozen": 8 << 20, "ours": (8 << 20) + (5 << 20)},
        ),
    ]
    rows = {(r["name"], r["where"]): r for r in evaluate(document)}
    assert len(rows) == len(TARGETS)
    at = "forward, fp32, K=N=4096, M=2048, r=16"
    assert rows["ours / merged", at]["verdict"] == PASS
    assert rows["ours / merged", at]["measured"] == pytest.approx(1.03)
    assert rows["ours packed / merged", at]["verdict"] == MISS
    assert rows["ours / PEFT", "forward, fp32, the grid"]["verdict"] == MISS
    at = "step, bf16, K=N=1024, M=2048, r=16, dropout 0.05"
    assert rows["ours / frozen", at]["verdict"] == PASS
    assert rows["ours fp32 adapters / frozen", at]["verdict"] == UNKNOWN
    assert rows["peak memory, ours / frozen", at]["verdict"] == MISS
    # 13 MiB less the 8 MiB of frozen and 64 KiB of adapter gradients.
    assert rows["workspace, ours", at]["measured"] == pytest.approx(5 - 1 / 16)
    assert rows["workspace, ours", at]["verdict"] == MISS
    # The faster of both PEFT modes counts: 11 / 9, not 11 / 20.
    faster = rows["ours / faster PEFT", "step, bf16, the grid"]
    assert faster["measured"] == pytest.approx(11 / 9)
    assert step.id in faster["note"]


def test_wrong_cells_are_no_measurement():
    cell = shapes.square(shapes.FORWARD, "float32", 4096, 512)
    document = results.new_document("headline", MACHINE)
    result = synthetic(cell, {"merged": 1.0, "ours": 0.5})
    document["cells"] = [{**result, "status": "wrong"}]
    assert {row["verdict"] for row in evaluate(document)} == {UNKNOWN}


def test_disturbed_cells_give_bytes_but_no_verdict_on_time():
    step = shapes.square(shapes.STEP, "bfloat16", 1024, 2048, dropout_p=shapes.DROPOUT)
    document = results.new_document("headline", MACHINE)
    document["cells"] = [synthetic(step, {"frozen": 1.0, "ours": 0.5})]
    document["cells"][0]["timing"]["frozen"]["disturbed"] = True
    rows = {r["name"]: r for r in evaluate(document) if "step, bf16, K=N=1024" in r["where"]}
    assert rows["ours / frozen"]["verdict"] == UNKNOWN
    assert "disturbed" in rows["ours / frozen"]["note"]
    assert rows["peak memory, ours / frozen"]["verdict"] == PASS


def test_ratio_pairs_the_rounds():
    cell = small()
    result = synthetic(cell, {"frozen": 1.0, "ours": 1.0})
    result["timing"]["frozen"]["samples"] = [1.0, 2.0, None, 4.0]
    result["timing"]["ours"]["samples"] = [2.0, 4.0, 9.0, 8.0, 5.0]
    found = results.ratio(result, "ours", "frozen")
    assert (found.median, found.n) == (2.0, 3)


@pytest.mark.parametrize("mode", [shapes.FORWARD, shapes.STEP])
def test_planted_wrong_ours_is_caught(mode):
    def five_percent_off(problem, dropout_p):
        variant = variants.ours(problem, dropout_p)
        right = variant.call
        return replace(variant, call=lambda x: right(x) * 1.05)

    builders = {**without(*SLOW_TO_IMPORT), "ours": five_percent_off}
    result = runner.run_cell(small(mode, "bfloat16"), QUICK, builders=builders)
    assert result["status"] == "wrong"
    assert "out: max error" in result["disagreements"]["ours"][0]
    assert "ours_fp32" not in result["disagreements"]


def test_wrong_gradient_alone_is_caught_and_fails_the_program(tmp_path, capsys):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    def wrong_dx(problem, dropout_p):
        variant = variants.ours(problem, dropout_p)
        right = variant.call
        return replace(variant, call=lambda x: right(Scaled.apply(x)))

    builders = {**without(*SLOW_TO_IMPORT), "ours": wrong_dx}
    result = runner.run_cell(small(), QUICK, builders=builders)
    assert [text.split(":")[0] for text in result["disagreements"]["ours"]] == ["dx"]
    from benchmarks.__main__ import finish

    document = results.new_document("headline", MACHINE)
    document["cells"] = [result]
    assert finish(document, tmp_path / "results.json", with_plots=False) == 1
    assert "**WRONG**" in (tmp_path / "report.md").read_text()


def test_nan_and_wrong_shape_do_not_agree():
    expected = torch.ones(4, 4)
    tolerance = agreement.TOLERANCE[torch.float32]
    assert agreement.error_of(expected, expected).within(tolerance)
    assert not agreement.error_of(expected * float("nan"), expected).within(tolerance)
    assert not agreement.error_of(expected[0], expected).within(tolerance)


def test_failing_variant_becomes_an_entry():
    result = runner.run_cell(small(), QUICK, builders=without(*SLOW_TO_IMPORT, "unsloth"))
    assert result["status"] == "ok"
    assert result["errors"]["unsloth"] == "ImportError: not installed"
    assert "unsloth" not in result["timing"] and "ours" in result["timing"]
    document = results.new_document("headline", MACHINE)
    document["cells"] = [result]
    assert "Unsloth-style: left out" in report.text(document)


def test_failing_cell_becomes_an_entry():
    def no_memory(cell):
        raise MemoryError("too large")

    result = runner.run_cell(small(), QUICK, make=no_memory)
    assert (result["status"], result["error"]) == ("error", "MemoryError: too large")


@pytest.mark.parametrize("full", [False, True])
def test_cells_are_unique_and_serve_all_targets(full):
    cells = chosen_cells(full, "")
    assert len({c.id for c in cells}) == len(cells)
    document = results.new_document("full", MACHINE)
    for cell in cells:
        names = variants.names_for(cell)
        document["cells"].append(synthetic(cell, dict.fromkeys(names, 1.0)))
    verdicts = {(r["name"], r["where"]): r["verdict"] for r in evaluate(document)}
    assert UNKNOWN not in verdicts.values(), verdicts


def test_problem_is_the_same_layer_in_every_dtype():
    problem = make_problem(small(dtype="bfloat16"))
    half, single = problem.adapters(torch.bfloat16), problem.adapters(torch.float32)
    for a, b in zip(half, single, strict=True):
        assert torch.equal(a.float(), b) and a.requires_grad and b.is_leaf
    assert len(problem.inputs) >= 3
    assert not torch.equal(problem.inputs[0], problem.inputs[1])


def test_sentences_are_english_sentences():
    found = [text for text, _ in zip(real_model.sentences(), range(50), strict=False)]
    assert len(set(found)) == 50
    assert all(text[0].isupper() and text[-1] in ".!?" for text in found)


def test_report_of_a_missing_file_says_so(tmp_path, capsys):
    assert report.main([str(Path(tmp_path / "none.json"))]) == 2
    assert "none.json" in capsys.readouterr().err


def test_missing_gpu_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_device("cpu") == ""
    assert "CUDA" in missing_device("cuda")
