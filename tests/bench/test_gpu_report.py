"""What becomes of the results of `make gpu`: predictions beside them, report, pictures, keeping."""

import runpy
from dataclasses import replace

import pytest
from bench_helpers import MACHINE, QUICK, measured_run, new_run, small, synthetic_case

from benchmarks import report, results, runner, shapes
from benchmarks.gpu import cases, gpu_targets, measure, predicted, profile, stages
from lora_ext import _C
from lora_ext.kernels import CARDS


def test_predictions_stand_beside_measurements(tmp_path):
    run = new_run(tmp_path, {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"})
    cell = small(shapes.FORWARD, "bfloat16")
    runner.run([cell], run.document, run.path, QUICK)
    measure.predict(run)
    by_variant = {entry["variant"]: entry for entry in run.document["predictions"]}
    assert {"merged", "ours", "ours_fp32"} <= set(by_variant) and "naive" not in by_variant
    expected = sum(us for _, us in predicted.launches_of(CARDS["H100"], cell, "merged"))
    assert by_variant["merged"]["predicted_us"] == expected
    measured = run.document["cells"][0]["timing"]["merged"]["ms"]
    assert by_variant["merged"]["measured_us"] == pytest.approx(1e3 * measured)
    run.document["cells"][0]["graph"] = {"merged": {"ms": 7.0}}  # a replay goes before a call
    measure.predict(run)
    merged = next(e for e in run.document["predictions"] if e["variant"] == "merged")
    assert merged["measured_us"] == 7000.0


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


def test_cards_are_found_by_the_name_of_the_device():
    assert predicted.card_named("NVIDIA A100-SXM4-40GB") is CARDS["A100"]
    assert predicted.card_named("NVIDIA GeForce RTX 5090") is CARDS["RTX 5090"]


def test_no_prediction_for_a_card_that_is_not_in_the_table(tmp_path):
    run = new_run(tmp_path, {**MACHINE, "gpu": "Tesla V100"})
    measure.predict(run)
    assert run.document["predictions"] == []


def test_the_furthest_from_its_prediction_comes_first(tmp_path):
    run = measured_run(tmp_path)
    chosen = profile.furthest(run)
    ours = [e for e in run.document["predictions"] if e["variant"].startswith("ours")]
    worst = max(ours, key=lambda e: e["measured_us"] / e["predicted_us"])
    assert (chosen[0][0].id, chosen[0][1]) == (worst["cell"], worst["variant"])
    assert len(chosen) == 3


def test_report_and_pictures_of_a_gpu_run(tmp_path):
    pytest.importorskip("matplotlib")
    run = measured_run(tmp_path)
    counters = [{"kernel": "lora_gemm_sm80", "us": 351.2, "DRAM bytes read": 101.5e6}]
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
        counters=counters,
    )
    run.document["cells"][0]["card"] = {
        "before": {"clocks.sm": 1980.0},
        "after": {"clocks.sm": 1755.0},
    }
    results.write(run.document, run.path)
    assert report.main([str(run.path)]) == 0
    pictures = {"forward.png", "backward.png", "step.png", "memory.png"}
    pictures |= {"roofline.png", "predictions.png", "adapters.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", *pictures}
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "## Backward, as a multiple of frozen, graph replays (GPU)" in text
    assert "| lora_gemm_sm80 |" in text and "lora_gemm 340.0" in text and "1755.0" in text
    assert "measured / predicted" in text and all(f"({name})" in text for name in pictures)


def test_batches_of_many_adapters_are_reported_with_calls_replays_and_what_went_wrong(tmp_path):
    run = measured_run(tmp_path)
    rows = run.document["adapters"]
    rows[0]["graph"] = rows[0]["timing"]
    rows[0]["card"] = {"before": {"clocks.sm": 1111.0}, "after": {"clocks.sm": 2222.0}}
    rows[1]["disagreements"] = {"grouped": ["dx is off"]}
    rows[2] |= {"status": "error", "error": "stopped after 60 s", "timing": {}}
    rows[3] = {"case": rows[3]["case"], "status": "error", "error": "a fault"}  # as a lost child's
    rows[3] |= {"errors": {}, "notes": {}}
    text = report.text(run.document)
    assert "## Many adapters, forward, graph replays (GPU)" in text
    assert "## Many adapters, step (GPU)" in text
    assert "## Many adapters, step, graph replays (GPU)" not in text
    assert "8192 rows x 64 adapters K=N=4096 r=16" in text and "grouped_mm DISAGREES" in text
    assert "stopped after 60 s" in text and "a fault" in text and "2222.0" in text
    layers = run.document["mixtures"]
    layers[0] |= {"status": "wrong", "disagreements": {"ours": ["out is off"]}}
    layers[-1]["graph"] = layers[-1]["timing"]
    text = report.text(run.document)
    assert "## Experts, step (GPU)" in text and "## Experts, forward, graph replays (GPU)" in text
    assert "## Experts, step, graph replays (GPU)" not in text
    assert "gpt-oss-20b bf16 4096 tokens r=16" in text.replace(" step", "").replace(" forward", "")
    assert (
        "Qwen3-30B-A3B step bf16 4096 tokens r=16: ours DISAGREES with float64: out is off" in text
    )
    assert "Many adapters" not in report.text(new_run(tmp_path).document)


@pytest.mark.parametrize(("ours", "verdict"), [(1.04, "pass"), (1.06, "miss")])
def test_the_forward_of_many_adapters_has_a_target(tmp_path, ours, verdict):
    run = measured_run(tmp_path)
    first = run.document["adapters"][0]
    times = {"merged": 1.0, "ours_offs": ours}
    first["graph"] = synthetic_case(cases.many_cases()[0], times)["timing"]
    [row] = gpu_targets.evaluate(run.document)
    assert (row["verdict"], row["measured"]) == (verdict, ours) and "replays" in row["note"]
    run.document["targets"] = [row]
    assert "8192 rows x 64 adapters" in report.text(run.document)
    del first["graph"]
    assert gpu_targets.evaluate(run.document)[0]["measured"] == 1.04
    first["timing"]["ours"]["disturbed"] = True
    assert gpu_targets.evaluate(run.document)[0]["verdict"] == "not measured"
    first["status"] = "wrong"
    assert gpu_targets.evaluate(run.document)[0]["verdict"] == "not measured"
    run.document["machine"] = MACHINE
    assert gpu_targets.evaluate(run.document) == []


def test_results_are_kept_where_the_repository_looks_for_them(tmp_path):
    places = runpy.run_path(str(stages.ROOT / "scripts" / "keep_gpu_results.py"))["places"]
    folder, root = tmp_path / "out", tmp_path / "root"
    run = measured_run(folder)
    run.write()
    for name in ("report.md", "roofline.png", "golden/h100.json", "tuning/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    found = {str(target.relative_to(root)) for target in places(folder, "h100", root).values()}
    assert found == {
        "benchmarks/results/h100/gpu/results.json",
        "benchmarks/results/h100/gpu/report.md",
        "benchmarks/results/h100/gpu/roofline.png",
        "emulator/conformance/golden/h100.json",
        "benchmarks/results/h100/gpu/a.json",
    }
    with pytest.raises(ValueError, match="expected a name like"):
        places(folder, "../h100")
    new_run(tmp_path / "cpu", MACHINE).write()
    with pytest.raises(ValueError, match="trial on a CPU"):
        places(tmp_path / "cpu", "cpu")
