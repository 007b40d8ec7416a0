"""`make gpu` without a GPU: stages, resuming, missing tools, a full disk, predictions, pictures."""

import importlib.util
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import smallest_of_each_kind
from test_benchmarks import MACHINE, QUICK, small, synthetic

import lora_ext
from benchmarks import calls, card, cost_model, report, results, runner, shapes, variants
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cells, checks, measure, profile, stages, stress
from benchmarks.gpu.run import Run, bring, resumed
from benchmarks.problem import make_problem
from lora_ext import _C
from lora_ext.winners import Table, write_table

H100 = {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3", "device": "cuda"}
CEILINGS = {"status": "done", "tflops": 600.0, "dram_gb_s": 2500.0, "summary": "", "seconds": 1.0}


def new_run(folder, machine=MACHINE, device="cuda", seconds=1000.0, quick=False):
    document = results.new_document("gpu", machine)
    return Run(device, folder, document, quick, time.monotonic() + seconds)


def stage(name, outcome, called, seconds=1.0, quick=True):
    def run(given, limit_s):
        called.append(name)
        if isinstance(outcome, BaseException):
            raise outcome
        return stages.result_of(outcome, name)

    return stages.Stage(name, seconds, run, quick)


def test_each_result_is_written_at_once_and_a_failure_ends_nothing(tmp_path, monkeypatch):
    called, run, written = [], new_run(tmp_path), []
    monkeypatch.setattr(Run, "write", lambda self: written.append(json.dumps(self.stages)))
    chosen = [
        stage("first", "done", called),
        stage("second", OSError("no space left on device"), called),
        stage("third", "failed", called),
        stage("fourth", "done", called),
    ]
    stages.run_stages(run, chosen)
    assert called == ["first", "second", "third", "fourth"]
    assert "no space left" in run.stages["second"]["summary"]
    assert [len(json.loads(text)) for text in written] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert json.loads(written[2])["second"]["status"] == "begun"


def test_what_is_not_done_is_done_again_and_what_failed_comes_last(tmp_path):
    called, run = [], new_run(tmp_path)
    outcomes = {"a": "failed", "b": "done", "c": "missing", "d": "partial", "e": "done"}
    chosen = [stage(name, outcome, called) for name, outcome in outcomes.items()]
    stages.run_stages(run, chosen[:4])
    run.stages["b"]["status"] = "begun"  # as a run leaves it that is killed in it
    called.clear()
    stages.run_stages(run, chosen)
    assert called == ["d", "e", "a", "b", "c"]
    called.clear()
    run.checking = "other tests"
    stages.run_stages(run, chosen)
    assert called == ["b", "d", "e", "a", "c"]


def test_an_interrupt_leaves_a_stage_as_it_was(tmp_path):
    called, run = [], new_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stages.run_stages(run, [stage("new", KeyboardInterrupt(), called)])
    assert run.stages == {}
    stages.run_stages(run, [stage("old", "partial", called)])
    with pytest.raises(KeyboardInterrupt):
        stages.run_stages(run, [stage("old", KeyboardInterrupt(), called)])
    assert run.stages["old"]["status"] == "partial"


def test_no_stage_may_take_more_than_thrice_its_time_or_the_time_left(tmp_path):
    limits = []
    long = stages.Stage("long", 10, lambda run, s: limits.append(s) or stages.missing(""))
    stages.run_stages(new_run(tmp_path, seconds=100), [long])
    stages.run_stages(new_run(tmp_path, seconds=20), [long])
    assert limits[0] == 30 and 19 < limits[1] <= 20


def test_a_stage_that_does_not_fit_waits_for_the_next_call(tmp_path):
    called, run = [], new_run(tmp_path, seconds=10)
    chosen = [stage("long", "done", called, seconds=60), stage("short", "done", called, seconds=5)]
    stages.run_stages(run, chosen)
    assert called == ["short"] and "long" not in run.stages
    stages.run_stages(new_run(tmp_path, device="cpu", seconds=10), chosen)
    assert called == ["short", "long", "short"]
    called.clear()
    run.end += 100
    stages.run_stages(run, chosen)
    assert called == ["long"]


def test_quick_leaves_out_what_is_not(tmp_path):
    called = []
    chosen = [stage("a", "done", called), stage("b", "done", called, quick=False)]
    stages.run_stages(new_run(tmp_path, quick=True), chosen)
    assert called == ["a"]


def test_sanitizers_see_every_kind_of_tile():
    """The kinds that csrc/plan/plan.h has, each by its smallest tile."""
    card = lora_ext.kernels.CARDS["H100"]
    tiles = _C.tiles_of(card, backward=False, float_adapters=False, dropout=False)
    chosen = smallest_of_each_kind(tiles)
    assert len(chosen) == 4 and {"in-grid", "wgmma", "pingpong"} <= {t.split()[0] for t in chosen}


def test_missing_tools_are_results(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    run = new_run(tmp_path)
    found = checks.sanitizer("memcheck")(run, 1.0)
    assert found["status"] == "missing" and "compute-sanitizer" in found["summary"]
    assert profile.worst(run, 1.0)["status"] == "missing"
    assert profile._with_ncu(run, small(), "ours", 1.0) == ([], "no ncu on the PATH")


def test_resuming_needs_the_same_machine(tmp_path, capsys):
    path = tmp_path / "results.json"
    document = results.new_document("gpu", MACHINE)
    document["stages"] = {"first": {"status": "done"}}
    results.write(document, path)
    fresh = results.new_document("gpu", MACHINE)
    assert resumed(path, fresh)["stages"] == document["stages"]
    other = results.new_document("gpu", {**MACHINE, "name": "another"})
    assert resumed(path, other) is other and "(name differ)" in capsys.readouterr().err
    rebuilt = results.new_document("gpu", {**MACHINE, "sources": "of other kernels"})
    results.write(document, path)
    assert resumed(path, rebuilt) is rebuilt
    assert not path.exists() and (tmp_path / "results.json.old").exists()
    path.write_text("{ half a docu")
    assert resumed(path, other) is other and "is not read" in capsys.readouterr().err


def test_results_are_brought_from_another_folder_once(tmp_path):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    results.write(results.new_document("gpu", MACHINE), earlier / "results.json")
    (earlier / "tuning").mkdir()
    (earlier / "tuning" / "a.json").write_text("{}")
    bring(tmp_path / "nothing", out)
    assert not out.exists()
    bring(earlier, out)
    assert (out / "tuning" / "a.json").exists()
    (out / "results.json").write_text("newer")
    bring(earlier, out)
    assert (out / "results.json").read_text() == "newer"


def test_predictions_stand_beside_measurements(tmp_path):
    run = new_run(tmp_path, {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"})
    cell = small(shapes.FORWARD, "bfloat16")
    runner.run([cell], run.document, run.path, QUICK)
    measure.predict(run)
    by_variant = {entry["variant"]: entry for entry in run.document["predictions"]}
    assert {"merged", "ours", "ours_fp32", "naive"} <= set(by_variant)
    expected = cost_model.predicted_us(cost_model.MACHINES["H100"], cell, "merged")
    assert by_variant["merged"]["predicted_us"] == expected
    measured = run.document["cells"][0]["timing"]["merged"]["ms"]
    assert by_variant["merged"]["measured_us"] == pytest.approx(1e3 * measured)
    run.document["cells"][0]["graph"] = {"merged": {"ms": 7.0}}  # a replay goes before a call
    run.stages["ceilings"] = {"status": "done", "tflops": 1.0, "dram_gb_s": 1.0}
    measure.predict(run)
    merged = next(e for e in run.document["predictions"] if e["variant"] == "merged")
    assert merged["predicted_us"] > expected and merged["measured_us"] == 7000.0


def test_no_prediction_for_a_card_that_is_not_in_the_table(tmp_path):
    run = new_run(tmp_path, {**MACHINE, "gpu": "Tesla V100"})
    measure.predict(run)
    assert run.document["predictions"] == []


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


def measured_run(folder):
    """A run on an H100 that never was, for tables and pictures."""
    run = new_run(folder, H100)
    run.stages["ceilings"] = CEILINGS
    times = {"merged": 1.0, "frozen": 1.0, "ours": 1.1, "ours_kernel": 1.5, "peft_default": 2.2}
    for cell in [c for c in cells.headline_cells() if c.group == "model"]:
        result = synthetic(cell, times)
        result["graph"] = synthetic(cell, {k: 0.9 * t for k, t in times.items()})["timing"]
        run.document["cells"].append(result)
    measure.predict(run)
    return run


def test_the_furthest_from_its_prediction_comes_first(tmp_path):
    run = measured_run(tmp_path)
    chosen = profile.furthest(run)
    ours = [e for e in run.document["predictions"] if e["variant"].startswith("ours")]
    worst = max(ours, key=lambda e: e["measured_us"] / e["predicted_us"])
    assert (chosen[0][0].id, chosen[0][1]) == (worst["cell"], worst["variant"])
    assert len(chosen) == 3


def test_kernels_of_a_call_are_listed(tmp_path):
    cell = replace(small(shapes.FORWARD), device="cpu")
    names = [name for name, _ in profile.kernels_of(cell, "ours")]
    assert "lora_ext::lora_linear" in names


def test_report_and_pictures_of_a_gpu_run(tmp_path):
    pytest.importorskip("matplotlib")
    run = measured_run(tmp_path)
    run.stages["profile"] = stages.result_of(
        "done",
        "",
        profiles=[
            {
                "cell": "a cell",
                "variant": "ours",
                "kernels": [["lora_gemm_sm80", 351.2], ["lora_reduce", 2.5]],
                "predicted": [["lora_gemm", 340.0]],
            }
        ],
        counters=profile.counters(NCU),
    )
    run.document["cells"][0]["card"] = {
        "before": {"clocks.sm": 1980.0},
        "after": {"clocks.sm": 1755.0},
    }
    results.write(run.document, run.path)
    assert report.main([str(run.path)]) == 0
    pictures = {"roofline.png", "ratios.png", "memory.png", "predictions.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", *pictures}
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "## Backward, as a multiple of frozen, graph replays (GPU)" in text
    assert "| lora_gemm_sm80 |" in text and "lora_gemm 340.0" in text and "1755.0" in text
    assert "measured / predicted" in text and all(f"({name})" in text for name in pictures)


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


COMMAND = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]


@pytest.mark.slow
def test_the_whole_run_on_the_cpu_can_be_killed_and_resumed(tmp_path):
    command = [*COMMAND, "--out", str(tmp_path), "--budget", "20"]
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
    assert document["cells"]
    assert document["stages"]["kernels"] == kept["stages"]["kernels"]
    assert "test_plan.py" in (tmp_path / "log.txt").read_text()
    quick = {s.name for s in gpu.STAGES if s.quick}
    assert set(document["stages"]) == quick
    text = (tmp_path / "report.md").read_text()
    assert "## Stages (CPU)" in text and "golden vectors come from a GPU" in text
    assert torch.__version__ in text


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_measured(tmp_path):
    """Writes beyond a limit fail, as they do on a full disk; what fits has been kept."""
    only = ["--only", "ceilings", "headline", "stress"]
    command = [*COMMAND, "--out", str(tmp_path), "--budget", "8", *only]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    done = subprocess.run(
        command, cwd=stages.ROOT, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "is not written: " in done.stderr and "Traceback" not in done.stderr
    kept = results.read(tmp_path / "results.json")
    assert kept["stages"]["ceilings"]["status"] == "done" and len(kept["cells"]) < 14
    assert "as a multiple of merged" in done.stdout  # what could not be kept is printed
    assert not list(tmp_path.glob("*.partial"))


def test_stages_are_named_and_chosen(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "nothing"])
    assert "expected stages of conformance, warmup" in capsys.readouterr().err


def keeper():
    path = stages.ROOT / "scripts" / "keep_gpu_results.py"
    spec = importlib.util.spec_from_file_location("keep_gpu_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_kept_where_the_repository_looks_for_them(tmp_path):
    folder, root = tmp_path / "out", tmp_path / "root"
    run = measured_run(folder)
    run.write()
    for name in ("report.md", "roofline.png", "golden/h100.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    table = Table("NVIDIA H100", "2.11.0", "13.0", "0.1.0", "0f", ())
    write_table(table, folder / "tuning" / "a.json")
    found = {
        str(target.relative_to(root)) for target in keeper().places(folder, "h100", root).values()
    }
    assert found == {
        "benchmarks/results/h100/gpu/results.json",
        "benchmarks/results/h100/gpu/report.md",
        "benchmarks/results/h100/gpu/roofline.png",
        "tests/emulator/conformance/golden/h100.json",
        "lora_ext/winners/measured/a.json",
    }
    with pytest.raises(ValueError, match="expected a name like"):
        keeper().places(folder, "../h100")
    (folder / "tuning" / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="schema"):
        keeper().places(folder, "h100")


def test_pictures_are_drawn_where_results_are_kept(tmp_path):
    pytest.importorskip("matplotlib")
    measured_run(tmp_path).write()
    keeper().draw(tmp_path)
    assert (tmp_path / "predictions.png").exists()
    assert "(predictions.png)" in (tmp_path / "report.md").read_text()


def test_a_trial_on_the_cpu_is_not_kept(tmp_path):
    new_run(tmp_path, MACHINE).write()
    with pytest.raises(ValueError, match="trial on a CPU"):
        keeper().places(tmp_path, "cpu")
