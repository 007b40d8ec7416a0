"""Results files: written, read, refused; their ratios, targets, reports and figures."""

import json
from pathlib import Path

import pytest
from bench_helpers import MACHINE, QUICK, small, summary, synthetic

from benchmarks import report, results, runner, shapes, variants
from benchmarks.__main__ import chosen_cells
from benchmarks.targets import MISS, PASS, TARGETS, UNKNOWN, evaluate

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

# What is put in place of a part of a document, and what the refusal says.
FAULTS = {
    "no object": (lambda d: [d], "expected an object"),
    "another version": (lambda d: {**d, "schema_version": 0}, "expected lora_ext.* version 1"),
    "no kind": (lambda d: {**d, "kind": "other"}, "expected a kind of headline"),
    "no machine": (lambda d: {**d, "machine": None}, "expected machine, a dict"),
    "no rows": (lambda d: {**d, "cases": {}}, "expected cases, a list"),
    "no samples": (
        lambda d: {**d, "cases": [{"timing": {"ours": summary(2.0), "peft": {"ms": 1}}}]},
        "expected disturbed, ms.* of timing, peft",
    ),
    "no peak": (
        lambda d: {**d, "cases": [{"forward_memory": {"ours": 1}}]},
        "expected peak of forward_memory, ours",
    ),
}


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


def test_failed_write_keeps_the_previous_document(tmp_path, capsys):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)
    results.write(document, path)
    with pytest.raises(ValueError, match="JSON"):
        results.write({**document, "cells": [float("nan")]}, path)
    assert not results.keep(document, Path("/proc/no/such/folder/results.json"))
    assert "results.json is not written: " in capsys.readouterr().err
    assert results.read(path) == document


def test_a_row_is_a_line_and_a_number_eight_digits(tmp_path):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)
    document["cells"] = [synthetic(small(), {"ours": 1 / 3}), synthetic(small(), {"ours": 1e-9})]
    results.write(document, path)
    counts = [line.count('"id":') for line in path.read_text().splitlines()]
    assert [each for each in counts if each] == [1, 1]
    first, second = results.read(path)["cells"]
    assert first["timing"]["ours"]["ms"] == 0.33333333 and second == document["cells"][1]


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_results_file_is_refused(tmp_path, capsys, spoil, said):
    path = tmp_path / "results.json"
    document = results.new_document("models", MACHINE)
    results.write(document, path)
    assert results.read(path) == document
    path.write_text(json.dumps(spoil(document)))
    with pytest.raises(ValueError, match=said):
        results.read(path)
    assert report.main([str(path)]) == 2
    assert "results.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("results.json")), ids=lambda path: "/".join(path.parts[-3:-1])
)
def test_kept_results_are_read_and_reported(path):
    document = results.read(path)
    text = report.text(document, ["a.png"])
    assert text.startswith("# ") and "(a.png)" in text and "| " in text
    # Each line of a table in the report beside them is said again.
    kept = path.with_name("report.md").read_text().splitlines()
    figures = {line for line in kept if line.startswith("| ") and any(c.isdigit() for c in line)}
    assert figures and figures <= set(text.splitlines())


def test_tiny_run_renders_report(tmp_path):
    path = tmp_path / "results.json"
    document = results.new_document("headline", MACHINE)
    cells = [small(), small(shapes.FORWARD, "bfloat16", dropout_p=0.05), *shapes.call_cells()]
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
    from benchmarks import figures, layer_figures

    document = results.new_document("full", MACHINE)
    cell = shapes.square(shapes.STEP, "float32", 1024, 16)
    document["cells"] = [synthetic(cell, {"frozen": 1.0, "ours": 1.1, "peft": 1.2})]
    drawn = figures.save(layer_figures.figures(document), tmp_path)
    assert drawn == ["step.png", "memory.png"]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_missing_file_says_so(tmp_path, capsys):
    assert report.main([str(Path(tmp_path / "none.json"))]) == 2
    assert "none.json" in capsys.readouterr().err


def test_ratio_pairs_the_rounds():
    cell = small()
    result = synthetic(cell, {"frozen": 1.0, "ours": 1.0})
    result["timing"]["frozen"]["samples"] = [1.0, 2.0, None, 4.0]
    result["timing"]["ours"]["samples"] = [2.0, 4.0, 9.0, 8.0, 5.0]
    found = results.ratio(result, "ours", "frozen")
    assert (found.median, found.n) == (2.0, 3)


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


@pytest.mark.parametrize("kind", ["headline", "full", "few-rows", "many-rows"])
def test_cells_are_unique_and_serve_all_targets(kind):
    cells = chosen_cells(kind, "")
    assert len({c.id for c in cells}) == len(cells)
    document = results.new_document(kind, MACHINE)
    for cell in cells:
        names = variants.names_for(cell)
        document["cells"].append(synthetic(cell, dict.fromkeys(names, 1.0)))
    verdicts = {(r["name"], r["where"]): r["verdict"] for r in evaluate(document)}
    assert UNKNOWN not in verdicts.values(), verdicts
