"""`make gpu`: its children hang, crash or are wrong, and cost one item; the next call goes on.

Items and tests that misbehave run in real children, by child.py and recorder.py themselves.
"""

import sys
import time

import pytest
import torch
from bench_helpers import MACHINE, dies

from benchmarks import results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process, stages

# In the place of kinds.py, which would import torch; each item does what its name says.
KINDS = """
import os, signal, subprocess, sys, time, types

def measure(does, options):
    print("variant of", does, flush=True)
    if does == "hang":
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        def waits_for_a_kernel(): time.sleep(600)
        waits_for_a_kernel()
    if does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "leave":
        os._exit(0)
    if does == "fault":
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: 1 / 0)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    if does == "raise":
        raise ValueError("no\\nmore")
    if does == "wrong":
        return {"status": "wrong", "error": "dx is off"}
    if does == "nan":
        return {"ms": float("nan")}
    return {"pid": os.getpid(), **FOUND}

class Unavailable(Exception): pass
kind = types.SimpleNamespace(
    items=lambda options: dict(zip(NAMES, NAMES)), measure=measure, limit_s=lambda item: 3.0
)
kinds = types.SimpleNamespace(KINDS={"headline": kind, "device": kind}, Unavailable=Unavailable)
import benchmarks.gpu
benchmarks.gpu.kinds = sys.modules["benchmarks.gpu.kinds"] = kinds
from benchmarks.gpu import child
os._exit(child.main(sys.argv[1:]))
"""
CPU = ["--device", "cpu"]
CARD = {**MACHINE, "device": "cuda", "gpu": "NVIDIA H100", "lora_ext": {"cuda": True}}


def stage(*names, name="headline", seconds=100.0, **found):
    code = f"NAMES, FOUND = {names!r}, {found!r}\n{KINDS}"
    own = [sys.executable, "-E", "-c", code, "--device", "cpu"]
    return gpu.Stage(name, seconds, lambda options, words: [*own, *words])


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs `make gpu` with these stages; exit status and document."""

    def call(*chosen, budget=600, machine=CARD, more=()):
        does = "machine" if machine else "crash"
        device = stage(does, name="device", machine=machine, absent=["peft"])
        monkeypatch.setattr(gpu, "DEVICE", device)
        monkeypatch.setattr(gpu, "STAGES", chosen)
        status = gpu.main(["--out", str(tmp_path), "--budget", str(budget), *more])
        path = tmp_path / "results.json"
        return status, results.read(path) if path.exists() else None

    call.log = lambda: (tmp_path / "log.txt").read_text()
    return call


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("hang", "stopped after its limit, 0:00:03"),
        ("crash", "SIGSEGV; it last said: variant of crash"),
        ("leave", "it ended early; it last said: variant of leave"),
        ("fault", "division by zero"),
        ("raise", "ValueError: no"),
        ("wrong", "dx is off"),
        ("nan", "Out of range float values"),
    ],
)
def test_an_item_that_goes_wrong_is_red_and_costs_no_other(call, capsys, does, said):
    status, document = call(stage("a", does, "b", "c"))
    found = document["stages"]["headline"]
    assert status == 1 and found["status"] == "failed" and "3 ok" in found["summary"]
    [row] = document["failed"]
    assert (row["name"], row["status"]) == (does, "wrong" if does == "wrong" else "failed")
    assert said in row["error"] and said in capsys.readouterr().out
    if does == "hang":
        assert any("waits_for_a_kernel" in line for line in row["tail"])
        assert dies(int(next(line for line in row["tail"] if line.isdigit())))
    before = len(call.log())
    assert call(stage("a", does, "b", "c"))[0] == 1  # it stays red
    assert f"== {does}\n" not in call.log()[before:]
    status, document = call(stage("a", does, "b", "c"), more=["--again"])
    assert call.log()[before:].count(f"== {does}\n") == 1 and status == 1


def test_the_next_call_goes_on_where_one_was_killed(call, tmp_path, monkeypatch):
    """Of the item that it was at nobody knows anything: it comes last."""
    chosen = stage("a", seconds=5.0), stage("b", name="profile")
    status, document = call(*chosen, budget=55)
    assert status == 0 and list(document["stages"]) == ["headline"] and not document["complete"]
    run = gpu.Run(gpu.parser().parse_args(["--out", str(tmp_path)]), 0.0, CARD)
    rows = run.rows(stage("b", name="headline"))
    rows.add("", "begun")
    rows.add("b", "begun")
    with rows.path.open("a") as file:
        file.write('{"name": "a", "sta')  # its writer was killed in the line
    before = len(call.log())
    status, document = call(stage("a", "b", "c"))
    assert status == 0 and document["complete"] and "variant of a" not in call.log()[before:]
    assert call.log().index("variant of c") < call.log().index("variant of b")
    monkeypatch.setattr(gpu, "hash_of", lambda name: "of other sources")
    call(stage("a", "b", "c"))
    assert call.log().count("variant of a") == 2


def test_a_stage_stops_with_the_budget_and_nothing_is_to_blame(call):
    status, document = call(stage("a", "hang", seconds=1.0), budget=9)
    found = document["stages"]["headline"]
    assert status == 0 and found["status"] == "partial" and document["failed"] == []
    assert "1 ok of 2; the time was over" in found["summary"]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({**CARD, "lora_ext": {"cuda": False, "cuda_reason": "No nvcc."}}, "No nvcc."),
        (None, "no child could describe the device"),
    ],
)
def test_a_run_that_can_measure_nothing_does_not_begin(call, capsys, machine, said):
    status, document = call(stage("a"), machine=machine)
    assert status == 2 and document is None and said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_is_missing(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "built without CUDA" in said or "torch finds no CUDA device" in said


TESTS = """
import os, signal, sys, time
import pytest

def test_first(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n): assert n == 1, "two is wrong"

def test_skipped(): pytest.skip("nothing to do")

def test_hangs(): time.sleep(600)

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)

class Device:
    class cuda:
        is_initialized = staticmethod(lambda: True)
        @staticmethod
        def synchronize(): raise RuntimeError("CUDA error: misaligned address\\nmore")

def test_faults():
    sys.modules["torch"] = Device
    assert False

def test_last(): pass
"""


def suite(folder, *chosen):
    path = folder / "test_suite.py"
    path.write_text(TESTS)
    own = ["-c", "/dev/null", f"--rootdir={folder}", str(path), *chosen]
    return gpu.Stage("kernels", 100.0, stages.tests(own, own))


def test_tests_that_end_their_process_cost_no_other(call, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_TEST_S", 5.0)
    status, document = call(suite(tmp_path), machine=CARD | {"device": "cpu"}, more=CPU)
    found = document["stages"]["kernels"]
    assert status == 1 and found["summary"].startswith("3 ok 4 failed 1 skipped of 8")
    errors = {row["name"].partition("::")[2]: row["error"] for row in document["failed"]}
    assert errors["test_wrong[2]"].startswith("AssertionError: two is wrong")
    assert errors["test_hangs"].startswith("stopped after its limit")
    assert errors["test_crashes"].startswith("SIGSEGV")
    assert errors["test_faults"] == "CUDA error: misaligned address"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [(["-k", "skipped"], "1 skipped of 1"), (["-k", "no_such"], "of 0")],
)
def test_a_suite_of_which_nothing_passes_is_red(call, tmp_path, chosen, said):
    status, document = call(suite(tmp_path, *chosen), more=CPU)
    found = document["stages"]["kernels"]
    assert status == 1 and (found["status"], found["summary"]) == ("failed", said)


def test_a_command_that_is_deaf_is_killed_with_what_it_began(tmp_path):
    code = (
        "import signal, subprocess, time\n"
        "for name in ('SIGABRT', 'SIGTERM', 'SIGINT'):\n"
        "    signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    end = process.run([sys.executable, "-S", "-c", code], 2.0, tmp_path / "log.txt")
    assert end.is_late and end.how == "stopped after 2 s" and time.monotonic() - start < 60
    assert dies(int(end.said))


def test_a_trial_of_the_stages_that_need_no_card(tmp_path):
    """What they measure, in small; the report names each stage."""
    only = ["golden", "checks", "memcheck", "ceilings", "quantized", "tuning"]
    given = [*CPU, "--quick", "--out", str(tmp_path), "--budget", "30", "--only", *only]
    assert gpu.main(given) == 0
    document = results.read(tmp_path / "results.json")
    status = {name: found["status"] for name, found in document["stages"].items()}
    missing = dict.fromkeys(("golden", "checks", "memcheck"), "missing")
    assert {**missing, "ceilings": "done"}.items() <= status.items()
    assert status["quantized"] in ("done", "partial") and document["quantized"]
    text = (tmp_path / "report.md").read_text()
    assert "| golden    | missing |" in text and "## NF4, step (CPU)" in text
