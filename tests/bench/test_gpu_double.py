"""The whole of `make gpu` against a double of a GPU machine, whose every command can go wrong.

The double is a folder of programs: a Python that plays pytest, the conformance program, the stress
test and the children that are asked; compute-sanitizer; ncu. A file says which of them hang, crash
or fail. Whatever they do, the run goes on, keeps what they printed, leaves no process behind, and
the next run does again what was not done. How children end is test_gpu_children.py's subject, and
tests that end their process are test_gpu_suites.py's; here is one stage of each kind.
"""

import json
import re
import sys
from dataclasses import asdict, replace

import pytest
from bench_helpers import MACHINE, dies, synthetic, synthetic_case

from benchmarks import results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, cells, checks, child, measure, mixtures, profile
from benchmarks.shapes import FORWARD

FAKE = """
import json, os, signal, subprocess, sys, time

FOLDER = {folder!r}
MODES = json.load(open(FOLDER + "/modes.json"))
DATA = json.load(open(FOLDER + "/data.json"))

def misbehave(name):
    mode = MODES.get(name)
    if mode is None:
        return
    print("about to " + mode + " in " + name, flush=True)
    if mode == "hang":
        print("grandchild", subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    elif mode == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif mode == "exit":
        sys.exit(3)

def say(answer):
    print("\\n@answer " + json.dumps(answer), flush=True)

def result_of(item, task):
    for subject in ("cell", "case"):
        if subject in item and task in ("cell", "adapters", "mixtures"):
            return {{"entry": DATA["entries"][json.dumps(item[subject], sort_keys=True)]}}
    return DATA[task]

def work(task):
    say({{"ready": True}})
    for number, line in enumerate(sys.stdin):
        item = json.loads(line)
        names = {{"cell": lambda: item["cell"]["layer"], "adapters": lambda: item["case"]["group"]}}
        names["mixtures"] = lambda: item["case"]["layer"]
        name = names.get(task, lambda: item.get("name", task))()
        misbehave(name)
        say({{"result": result_of(item, task)}})

arguments = " ".join(sys.argv[1:])
if "benchmarks.gpu.child_tasks" in arguments:
    work(sys.argv[3])
else:
    kinds = {{"conformance": "conformance", "pool_stress": "pool", "stress": "stress"}}
    kinds |= {{"gpu.quantized": "quantized", "gpu.decode": "decode"}}
    kinds |= {{"profile": "ncu", "-k san": "tool", "tests --ignore": "tests", "test_many": "many"}}
    kinds |= {{"test_experts": "experts"}}
    name = next((kind for text, kind in kinds.items() if text in arguments), None)
    name = name or ("kernels" if "test_cuda_kernels" in arguments else "tests")
    name = os.environ.get("DOUBLE", name)
    if "-m pytest " in arguments:
        known = open(sys.argv[sys.argv.index("--without") + 1]).read().split()
        for test in ("first", "second", "third"):
            if test not in known:
                print("\\n@test begin " + test, flush=True)
                if test == "second":
                    misbehave(name)
                print(".\\n@test passed " + test, flush=True)
    else:
        misbehave(name)
    print(DATA["ncu"] if name == "ncu" else name + ": all passed")
"""

SANITIZER = """#!/bin/sh
DOUBLE=$2
export DOUBLE
while [ "$1" != -m ]; do last=$1; shift; done
exec "$last" "$@"
"""

NCU = """#!/bin/sh
while [ "$1" != -m ]; do last=$1; shift; done
exec "$last" "$@"
"""

NCU_SAYS = '''"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","lora_gemm_sm80","gpu__time_duration.sum","ns","351,200"'''

CELLS = [c for c in cells.headline_cells() if (c.group, c.mode) == ("model", FORWARD)][:3]
WIDE = cells.wide_cells()[:16:8]
LAYERS = mixtures.mixtures()[::6]
MANY = list({case.group: case for case in cases.many_cases()}.values())
LISTS = ("cells", "adapters", "mixtures")
CARD = {**MACHINE, "device": "cuda", "gpu": "NVIDIA H100"}
TIMES = {"merged": 1.0, "frozen": 1.0, "ours": 1.1, "peft_default": 2.2}


@pytest.fixture
def double(tmp_path, monkeypatch):
    """Installs the double; returns a function that runs stages of `make gpu` on it."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    programs = {
        "python": f"#!{sys.executable} -S\n" + FAKE.format(folder=str(tmp_path)),
        "compute-sanitizer": SANITIZER,
        "ncu": NCU,
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    machine = {**CARD, "lora_ext": {"cuda": True}}
    data = {
        "device": {"machine": machine},
        "kernels": {"names": ["wgmma", "pingpong", "fused-shrink"]},
        "check": {"failed": ""},
        "ceilings": {"tflops": 600.0, "dram_gb_s": 2500.0},
        "profile": {"kernels": [["lora_gemm_sm80", 351.2]]},
        "tune": {"entries": 2, "not_library": 1},
        "ncu": NCU_SAYS,
        "entries": {
            json.dumps(asdict(one), sort_keys=True): made(one, TIMES)
            for made, every in ((synthetic, [*CELLS, *WIDE]), (synthetic_case, [*MANY, *LAYERS]))
            for one in every
        },
    }
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(child, "PYTHON", str(tools / "python"))
    monkeypatch.setattr(cells, "headline_cells", lambda: CELLS)
    monkeypatch.setattr(cells, "wide_cells", lambda: WIDE)
    monkeypatch.setattr(cases, "many_cases", lambda: MANY)
    monkeypatch.setattr(mixtures, "mixtures", lambda: LAYERS)
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: name)  # transformers
    short = [replace(stage, seconds=5.0) for stage in gpu.STAGES]
    monkeypatch.setattr(gpu, "STAGES", short)

    def run(*only, modes=None, seconds=2.0, budget="600"):
        """Exit status and document; `seconds` is the limit of what is to hang."""
        (tmp_path / "modes.json").write_text(json.dumps(modes or {}))
        (tmp_path / "data.json").write_text(json.dumps(data))
        for name in ("_CELL_S", "_COMPILED_S", "_CASE_S", "_MIXTURE_S", "_SHAPE_S", "_CEILINGS_S"):
            monkeypatch.setattr(measure, name, seconds)
        for name in ("_TEST_S", "_SANITIZED_S", "_CHECK_S"):
            monkeypatch.setattr(checks, name, seconds)
        monkeypatch.setattr(profile, "_PROFILE_S", seconds)
        monkeypatch.setattr(profile, "_NCU_SECONDS", seconds)
        brief = {"conformance", "stress", "pool", "decode", "quantized", "profile"} & set(only)
        hanging = [replace(s, seconds=seconds / 3 if s.name in brief else 5.0) for s in short]
        monkeypatch.setattr(gpu, "STAGES", hanging if modes else short)
        given = ["--out", str(out), "--budget", budget, *(["--only", *only] if only else [])]
        status = gpu.main(given)
        path = out / "results.json"
        return status, results.read(path) if path.exists() else None

    run.data, run.out, run.tools = data, out, tools
    return run


def grandchildren(folder):
    return [
        int(pid)
        for pid in re.findall(r"^grandchild (\d+)$", (folder / "log.txt").read_text(), re.M)
    ]


def test_a_machine_on_which_all_is_well(double, capsys):
    status, document = double()
    assert status == 0 and document["complete"], capsys.readouterr()
    assert {result["status"] for result in document["stages"].values()} == {"done"}
    assert list(document["stages"]) == [stage.name for stage in gpu.STAGES]
    assert {result["cell"]["id"] for result in document["cells"]} == {c.id for c in [*CELLS, *WIDE]}
    assert document["stages"]["profile"]["counters"] == [
        {"kernel": "lora_gemm_sm80", "us": pytest.approx(351.2)}
    ]
    for part, chosen in (("adapters", MANY), ("mixtures", LAYERS)):
        assert {result["case"]["id"] for result in document[part]} == {c.id for c in chosen}
    assert document["machine"]["sources"] and document["predictions"]
    kept = {path.name for path in double.out.rglob("*") if path.is_file()}
    assert kept == {"results.json", "report.md", "log.txt"}  # and a golden file and a table: five
    before = (double.out / "log.txt").stat().st_size
    assert double()[0] == 0
    assert "kernels" not in (double.out / "log.txt").read_text()[before:]  # nothing is done twice


@pytest.mark.parametrize(
    ("stage", "name", "mode", "said"),
    [
        ("stress", "stress", "hang", "stopped after"),  # a command
        ("kernels", "kernels", "signal", "2 passed; second ended its process: SIGSEGV"),  # a suite
        ("warmup", "pingpong", "exit", "pingpong: exit status 3"),  # a child that is asked
        ("headline", CELLS[1].layer, "hang", "stopped after 2 s"),  # and measures
        ("adapters", MANY[1].group, "exit", "exit status 3"),
        ("mixtures", LAYERS[1].layer, "exit", "exit status 3"),
    ],
)
def test_a_stage_that_goes_wrong_is_said_kept_and_done_again(double, stage, name, mode, said):
    other = "stress" if stage != "stress" else "kernels"
    status, document = double(stage, other, modes={name: mode})
    assert status == 1 and document["stages"][stage]["status"] == "failed"
    assert f"about to {mode} in {name}" in (double.out / "log.txt").read_text()
    told = [document["stages"][stage], *(document.get(k) for k in LISTS)]
    assert said in json.dumps(told)
    assert document["stages"][other]["status"] == "done"
    rows = [row for part in LISTS for row in document.get(part, [])]
    assert [row["status"] for row in rows].count("error") == (stage in ("headline", *LISTS))
    assert all(dies(pid) for pid in grandchildren(double.out))
    assert len(grandchildren(double.out)) == (mode == "hang")
    report = (double.out / "report.md").read_text()
    assert re.search(rf"^\| {stage} +\| failed +\|", report, re.MULTILINE)
    status, document = double(stage)
    assert status == 0 and document["stages"][stage]["status"] == "done"
    assert all(r["status"] == "ok" for part in LISTS for r in document.get(part, []))


def test_ours_that_is_wrong_about_many_adapters_fails_the_stage_each_time(double):
    key = json.dumps(asdict(MANY[0]), sort_keys=True)
    double.data["entries"][key] |= {"status": "wrong", "disagreements": {"ours": ["dx is off"]}}
    for _ in range(2):
        status, document = double("adapters")
        found = document["stages"]["adapters"]
        assert status == 1 and found["status"] == "failed"
        assert f"1 of them wrong, such as {MANY[0].id}" in found["summary"]


def test_cells_that_failed_come_last_when_the_run_goes_on(double):
    double("headline", modes={CELLS[0].layer: "exit"})
    log = double.out / "log.txt"
    before = log.stat().st_size
    double("headline", "wide")
    said = log.read_text()[before:]
    assert CELLS[0].id in said and CELLS[1].id not in said  # what is measured stays
    assert said.index(WIDE[0].id) < said.index(CELLS[0].id)  # what has not failed goes first


@pytest.mark.parametrize(
    ("tool", "stage", "status", "said"),
    [
        ("compute-sanitizer", "memcheck", "missing", "no compute-sanitizer on the PATH"),
        ("ncu", "profile", "done", "no ncu on the PATH"),
    ],
)
def test_a_missing_tool_is_said(double, tool, stage, status, said):
    double("headline")
    (double.tools / tool).unlink()
    _, document = double(stage, "stress")
    found = document["stages"][stage]
    assert found["status"] == status and said in found["summary"]
    assert document["stages"]["stress"]["status"] == "done"


NO_KERNELS = {**CARD, "lora_ext": {"cuda": False, "cuda_reason": "No nvcc."}}


@pytest.mark.parametrize(
    ("described", "modes", "said"),
    [
        ({"machine": NO_KERNELS}, {}, "No nvcc."),
        ({"reason": "torch finds no CUDA device"}, {}, "finds no CUDA"),
        ({}, {"device": "exit"}, "no child could describe the device"),
    ],
)
def test_a_run_that_can_measure_nothing_does_not_begin(double, capsys, described, modes, said):
    double.data["device"] = described
    status, document = double(modes=modes)
    assert status == 2 and document is None and said in capsys.readouterr().err


def test_kernels_that_fail_their_check_are_named(double):
    double.data["check"] = {"failed": "dx is wrong"}
    status, document = double("warmup")
    found = document["stages"]["warmup"]
    assert status == 1 and found["status"] == "failed"
    assert found["summary"] == "3 of 3 kernels checked, 3 failed; 0 of them for many adapters"
    assert "pingpong: dx is wrong" in found["tail"]
