"""`make gpu` without a GPU: stages, resuming, missing tools, predictions."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_benchmarks import MACHINE, QUICK, small

from benchmarks import model, results, runner, shapes, variants
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import stages


def stage(name, outcome, calls, seconds=1.0, quick=True):
    def run(device, left):
        calls.append(name)
        if isinstance(outcome, Exception):
            raise outcome
        return {"status": outcome, "summary": name, "seconds": 0.0, "tail": []}

    return stages.Stage(name, seconds, run, quick)


def run(document, chosen, left=100.0, quick=False, device="cuda"):
    written = []
    stages.run_stages(
        document,
        device,
        lambda: left,
        lambda: written.append(json.dumps(document["stages"])),
        quick,
        chosen,
    )
    return written


def test_each_result_is_written_at_once_and_a_failure_ends_nothing():
    calls, document = [], {}
    chosen = [
        stage("first", "done", calls),
        stage("second", OSError("no space left on device"), calls),
        stage("third", "failed", calls),
        stage("fourth", "done", calls),
    ]
    written = run(document, chosen)
    assert calls == ["first", "second", "third", "fourth"] and len(written) == 4
    assert "no space left" in document["stages"]["second"]["summary"]
    assert [len(json.loads(text)) for text in written] == [1, 2, 3, 4]


def test_what_has_a_result_is_not_done_again():
    calls, document = [], {}
    chosen = [stage("first", "done", calls), stage("second", "failed", calls)]
    run(document, chosen[:1])
    run(document, chosen)
    assert calls == ["first", "second"]


def test_a_stage_that_does_not_fit_waits_for_the_next_call():
    calls, document = [], {}
    chosen = [stage("long", "done", calls, seconds=60), stage("short", "done", calls, seconds=5)]
    run(document, chosen, left=10)
    assert calls == ["short"] and "long" not in document["stages"]
    run({}, chosen, left=10, device="cpu")
    assert calls == ["short", "long", "short"]
    calls.clear()
    run(document, chosen, left=100)
    assert calls == ["long"]


def test_quick_leaves_out_what_is_not():
    calls, document = [], {}
    run(document, [stage("a", "done", calls), stage("b", "done", calls, quick=False)], quick=True)
    assert calls == ["a"]


def test_commands_that_hang_fail_or_are_not_there_are_results():
    python = sys.executable
    assert stages.run_command([python, "-c", "print(7)"], 60)["summary"] == "7"
    failed = stages.run_command([python, "-c", "raise SystemExit(3)"], 60)
    assert failed["status"] == "failed"
    slow = stages.run_command([python, "-c", "import time; time.sleep(60)"], 0.5)
    assert slow["status"] == "failed" and "stopped after" in slow["summary"]
    assert stages.run_command(["/no/such/program"], 1)["status"] == "missing"


def test_a_missing_sanitizer_is_a_result(monkeypatch):
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    found = stages.sanitizer("memcheck")("cuda", 1.0)
    assert found["status"] == "missing" and "compute-sanitizer" in found["summary"]


def test_resuming_needs_the_same_machine(tmp_path, capsys):
    path = tmp_path / "results.json"
    document = results.new_document("gpu", MACHINE)
    document["stages"] = {"first": {"status": "done"}}
    results.write(document, path)
    fresh = results.new_document("gpu", MACHINE)
    assert gpu.resumed(path, fresh)["stages"] == document["stages"]
    other = results.new_document("gpu", {**MACHINE, "name": "another"})
    assert gpu.resumed(path, other) is other
    assert not path.exists() and (tmp_path / "results.json.old").exists()
    path.write_text("{ half a docu")
    assert gpu.resumed(path, other) is other and "is not read" in capsys.readouterr().err


def test_predictions_stand_beside_measurements(tmp_path):
    document = results.new_document("gpu", {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"})
    cell = small(shapes.FORWARD, "bfloat16")
    runner.run([cell], document, tmp_path / "results.json", QUICK)
    gpu.predict(document)
    by_variant = {entry["variant"]: entry for entry in document["predictions"]}
    assert {"merged", "ours", "ours_fp32", "naive"} <= set(by_variant)
    expected = model.predicted_us(model.MACHINES["H100"], cell, "merged")
    assert by_variant["merged"]["predicted_us"] == expected
    measured = document["cells"][0]["timing"]["merged"]["ms"]
    assert by_variant["merged"]["measured_us"] == pytest.approx(1e3 * measured)
    document["stages"] = {"ceilings": {"status": "done", "tflops": 1.0, "dram_gb_s": 1.0}}
    gpu.predict(document)
    assert document["predictions"][0]["predicted_us"] > expected


def test_no_prediction_for_a_card_that_is_not_in_the_table():
    document = results.new_document("gpu", {**MACHINE, "gpu": "Tesla V100"})
    gpu.predict(document)
    assert document["predictions"] == []


def test_a_cell_survives_the_json():
    cell = replace(small(), rank=3, bias=False)
    assert runner.cell_of({"cell": json.loads(json.dumps(cell.as_dict()))}) == cell


def test_cuda_cells_time_every_route():
    cell = shapes.Cell(shapes.STEP, "bfloat16", 8, 16, 16, device="cuda")
    assert set(variants.ROUTES) <= set(variants.names_for(cell))
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, device="cpu")))
    assert not set(variants.ROUTES) & set(variants.names_for(replace(cell, dtype="float32")))


@pytest.mark.slow
def test_the_whole_run_on_the_cpu_can_be_killed_and_resumed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    command += ["--out", str(tmp_path), "--budget", "20"]
    process = subprocess.Popen(command, cwd=stages.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("kernels:"):
            break
    process.kill()
    process.wait()
    kept = results.read(tmp_path / "results.json")
    assert kept["stages"]["kernels"]["status"] == "done"
    done = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming: " in done.stdout
    document = results.read(tmp_path / "results.json")
    assert document["complete"] and document["cells"]
    assert document["stages"]["kernels"] == kept["stages"]["kernels"]
    text = (tmp_path / "report.md").read_text()
    assert "## Stages (CPU)" in text and "golden vectors come from a GPU" in text
    assert torch.__version__ in text
