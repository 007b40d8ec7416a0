"""The benchmark of batches of many adapters: what is compared, checked and said."""

import copy
from dataclasses import replace

import pytest
import torch
from bench_helpers import summary

from benchmarks import report, results
from benchmarks.adapters import adapters_report, measure, variants
from benchmarks.adapters.__main__ import SUITE
from benchmarks.adapters.batch import Batch, make_batch
from benchmarks.adapters.cases import Case, all_cases
from benchmarks.machine import describe
from benchmarks.shapes import FORWARD, STEP
from benchmarks.timing import Plan
from benchmarks.variants import Unavailable, Variant, floor_of

QUICK = Plan(min_rounds=1, max_rounds=1, seconds=0.0, warmup_ms=0.0, batch_ms=0.0)


def case_of(mode=STEP, rows=12, adapters=3, **options):
    return Case("target", mode, rows, adapters, width=32, rank=8, **options)


@pytest.mark.parametrize("layout", ["ranges", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_every_variant_agrees_with_the_loop(mode, dtype, layout):
    row = measure.measure(case_of(mode, dtype=dtype, layout=layout), QUICK)
    assert row["status"] == "ok"
    assert row["disagreements"] == {}
    left_out = set(variants.names_for(case_of(mode))) - set(row["timing"])
    expected = left_out & {"grouped"} if dtype == "bfloat16" else {"grouped"}  # not in every torch
    expected |= {"peft", "gather"} if mode == STEP else set()
    expected |= {"bmm", "loop_ours", "ours_offs"} if layout == "mixed" else set()
    assert left_out == expected == {*row["notes"], *row["errors"]}


def test_one_of_ours_that_fails_is_an_error_and_a_peer_that_fails_is_not(monkeypatch):
    def fails(batch, dropout_p):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(variants.BUILDERS, "gather", fails)
    row = measure.measure(case_of(FORWARD), QUICK)
    assert row["status"] == "ok" and row["errors"] == {"gather": "RuntimeError: no such kernel"}
    monkeypatch.setitem(variants.BUILDERS, "ours_pool", fails)
    row = measure.measure(case_of(FORWARD), QUICK)
    assert row["status"] == "error" and row["error"].startswith("ours_pool: RuntimeError: no such")


def test_a_pool_with_room_for_more_and_names_of_samples_give_the_same():
    case = case_of(FORWARD, rows=12, adapters=3, capacity=5, tokens=4)
    row = measure.measure(case, QUICK)
    assert row["status"] == "ok" and row["disagreements"] == {}
    assert {"peft", "ours_pool"} <= set(row["timing"])
    batch = make_batch(replace(case, tokens=0))
    with pytest.raises(Unavailable, match="tokens differ"):
        variants.BUILDERS["peft"](batch, 0.0)


@pytest.mark.parametrize("name", ["ours", "ours_pool", "grouped", "bmm"])
@pytest.mark.parametrize("fault", ["neighbour", "scaling"])
def test_a_wrong_variant_is_seen(name, fault, monkeypatch):
    build = variants.BUILDERS[name]

    def wrong(batch, dropout_p):
        if fault == "neighbour":
            batch = copy.copy(batch)
            batch.lora_a, batch.lora_b = batch.lora_a.roll(1, 0), batch.lora_b.roll(1, 0)
            return build(batch, dropout_p)
        way = build(batch, dropout_p)
        return Variant(lambda x: way.call(x) * 1.1, way.adapters)

    monkeypatch.setitem(variants.BUILDERS, name, wrong)
    row = measure.measure(case_of(), QUICK)
    assert list(row["disagreements"]) == [name]
    assert row["status"] == ("wrong" if name.startswith("ours") else "ok")


def test_what_cannot_be_measured_says_why():
    many = case_of(FORWARD, rows=130, adapters=65)
    with pytest.raises(Unavailable, match="more than 64 adapters"):
        variants.BUILDERS["peft"](make_batch(many), 0.0)
    with pytest.raises(Unavailable, match="as many rows each"):
        variants.BUILDERS["bmm"](make_batch(case_of(rows=10)), 0.0)
    large = Case("target", FORWARD, 4096, 2, width=2048, rank=64)
    batch = Batch(large, *(torch.empty(0),) * 4, [], [])
    with pytest.raises(Unavailable, match="256 MiB"):
        variants.BUILDERS["gather"](batch, 0.0)


# ---- the report ----


def made_up(isa="avx512", ours=1.1):
    document = results.new_document("adapters", describe("cpu", "a machine"))
    document["machine"]["lora_ext"]["cpu_isa"] = isa
    for case in all_cases():
        floor = floor_of(case.mode)
        times = {name: summary(3.0) for name in variants.LABELS if name not in ("merged", "frozen")}
        times |= {floor: summary(1.0), "ours": summary(ours)}
        row = {"case": case.as_dict(), "status": "ok", "notes": {}, "disagreements": {}}
        row["timing"] = times
        if case.mode == STEP and case.group == "target":
            sizes = {"ours": (150, 60), "one": (100, 10), "frozen": (90, 0)}
            row["memory"] = {n: {"peak": p, "factors": f} for n, (p, f) in sizes.items()}
        document["cases"].append(row)
    document["complete"] = True
    return document


def test_targets():
    verdicts = {row[0]: row[-1] for row in adapters_report.targets(made_up())}
    assert verdicts["forward, 32 rows, over merged"] == "pass"
    assert verdicts["forward, 2048 rows, over merged"] == "MISS"
    assert verdicts["step, 256 rows, dropout, over a loop"] == "pass"
    slow = {row[0]: row[-1] for row in adapters_report.targets(made_up(ours=3.5))}
    assert set(slow.values()) == {"MISS", "pass"}
    assert slow["step, 256 rows, dropout, over grouped_mm"] == "MISS"
    assert all(v == "pass" for name, v in slow.items() if "memory" in name)


def test_with_amx_the_peers_are_the_bound():
    names = [row[0] for row in adapters_report.targets(made_up("amx"))]
    assert "forward, 32 rows, over PEFT" in names
    assert not any(name.endswith("over merged") for name in names)


def test_a_disturbed_cell_is_not_measured():
    document = made_up()
    document["cases"][0]["timing"]["ours"]["disturbed"] = True
    assert adapters_report.targets(document)[0][-1] == "not measured"


def test_the_report_and_its_picture(tmp_path):
    document = made_up()
    document["cases"][0]["notes"]["peft"] = "no such thing"
    document["cases"][1]["disagreements"]["grouped"] = ["out is off"]
    path = tmp_path / "results.json"
    results.write(document, path)
    assert report.main([str(path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "PEFT: left out of 1 cases: no such thing" in text
    assert "grouped_mm DISAGREES with the loop: out is off" in text
    assert "## Over adapters: step (CPU)" in text
    assert (tmp_path / "adapters.png").stat().st_size > 10_000


def test_command(tmp_path, monkeypatch, capsys):
    main, small = SUITE.main, [case_of(FORWARD), case_of()]
    monkeypatch.setattr("benchmarks.adapters.__main__.all_cases", lambda: small)
    for plan in ("_PLAN", "_SHORT_PLAN"):
        monkeypatch.setattr(f"benchmarks.adapters.__main__.{plan}", QUICK)
    assert main(["--out", str(tmp_path), "--no-plots", "--only", "step"]) == 0
    document = results.read(tmp_path / "results.json")
    assert [row["case"]["mode"] for row in document["cases"]] == [STEP]
    small[1] = replace(small[1], group="rows")
    assert main(["--out", str(tmp_path), "--no-plots", "--short"]) == 0
    short = results.read(tmp_path / "results.json")["cases"]
    assert [row["case"]["mode"] for row in short] == [FORWARD]
    assert "many adapters in one batch" in capsys.readouterr().out
    monkeypatch.setattr(
        "benchmarks.adapters.__main__.measure",
        lambda case, plan: measure.measure(case, plan) | {"status": "wrong"},
    )
    assert main(["--out", str(tmp_path), "--no-plots"]) == 1
    assert "WRONG" in capsys.readouterr().err
    monkeypatch.setattr(
        "benchmarks.adapters.__main__.measure",
        lambda case, plan: measure.measure(case, plan) | {"status": "error", "error": "a fault"},
    )
    assert main(["--out", str(tmp_path), "--no-plots"]) == 1
    assert "FAILED" in capsys.readouterr().err
