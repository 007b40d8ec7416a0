"""How layers are measured: what is checked, kept, dropped. No timing is asserted."""

from dataclasses import replace

import pytest
import torch
from bench_helpers import MACHINE, QUICK, small

from benchmarks import agreement, memory, report, results, runner, shapes, suite, variants
from benchmarks.machine import missing_device
from benchmarks.timing import CpuMeter, Plan, Sample, Timing, interleaved


def without(*names):
    """The builders, with these variants failing as if they were not installed."""

    def absent(problem, dropout_p):
        raise ImportError("not installed")

    return {**variants.BUILDERS, **dict.fromkeys(names, absent)}


SLOW_TO_IMPORT = ("peft", "peft_default", "loralib")


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
    document = results.new_document("headline", MACHINE)
    document["cells"] = [result]
    faults = suite.wrong(document, "cell", "naive")
    assert suite.finish(document, tmp_path / "results.json", faults, with_plots=False) == 1
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


def test_missing_gpu_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_device("cpu") == ""
    assert "CUDA" in missing_device("cuda")
