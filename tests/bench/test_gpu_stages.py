"""The stages of `make gpu`: their order and limits, resuming."""

import json

import pytest
from bench_helpers import MACHINE, new_run
from helpers import smallest_of_each_kind

import lora_ext
from benchmarks import results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, stages
from benchmarks.gpu.run import Run, bring, resumed
from lora_ext import _C


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
    """The kinds that csrc/kernels/plan/problem.h has, each by its smallest tile."""
    card = lora_ext.kernels.CARDS["H100"]
    tiles = _C.tiles_of(card, backward=False, float_adapters=False, dropout=False)
    chosen = smallest_of_each_kind(tiles)
    kinds = {"fused-shrink", "wgmma", "pingpong", "decode"}
    assert len(chosen) == 5 and kinds <= {tile.split()[0] for tile in chosen}


def test_stages_are_named_and_chosen(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "nothing"])
    assert "expected stages of conformance, warmup" in capsys.readouterr().err
    assert (stages.ROOT / checks._MANY).exists()


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
