"""The whole of `make gpu` against a double of a GPU machine, whose every command can go wrong.

The double is a folder of programs: a Python that plays pytest, the conformance program, the stress
test and the children that are asked; compute-sanitizer; ncu. A file says which of them hang, crash,
fail or print garbage. Whatever they do, the run goes on, keeps what they printed, leaves no process
behind, and the next run does again what was not done.
"""

import json
import re
import sys
from dataclasses import asdict, replace

import pytest
from bench_helpers import MACHINE, dies, synthetic, synthetic_case

from benchmarks import results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, cells, checks, child, measure, profile
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
    elif mode == "garbage":
        sys.stdout.buffer.write(bytes(range(256)) * 300 + b"\\n@answer {{\\n@answer []\\n")
        sys.stdout.flush()
        os._exit(1)

def say(answer):
    print("\\n@answer " + json.dumps(answer), flush=True)

def result_of(item, task):
    for subject in ("cell", "case"):
        if subject in item and task in ("cell", "adapters"):
            return {{"entry": DATA["entries"][json.dumps(item[subject], sort_keys=True)]}}
    return DATA[task]

def work(task):
    misbehave(task + " before ready")
    say({{"ready": True}})
    for number, line in enumerate(sys.stdin):
        item = json.loads(line)
        names = {{"cell": lambda: item["cell"]["layer"], "adapters": lambda: item["case"]["group"]}}
        name = names.get(task, lambda: item.get("name", task))()
        if MODES.get(name) == "fault":
            say({{"error": "CUDA error: misaligned address", "fault": "CUDA error: misaligned"}})
            return
        misbehave(name)
        say({{"result": result_of(item, task)}})

arguments = " ".join(sys.argv[1:])
if "benchmarks.gpu.child_tasks" in arguments:
    work(sys.argv[3])
else:
    kinds = {{"conformance": "conformance", "pool_stress": "pool", "stress": "stress"}}
    kinds |= {{"gpu.quantized": "quantized", "gpu.decode": "decode"}}
    kinds |= {{"profile": "ncu", "-k san": "tool", "tests --ignore": "tests", "test_many": "many"}}
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
MANY = list({case.group: case for case in cases.many_cases()}.values())
TIMES = {"merged": 1.0, "frozen": 1.0, "ours": 1.1, "peft_default": 2.2}

# What a stage's double is called; of the measured ones, the task.
SUITES = ("kernels", "many", "tests", *checks.SANITIZERS)
COMMANDS = ("conformance", "stress", "pool", "decode", "quantized", *SUITES)
TASKS = {
    "warmup": "pingpong",
    "ceilings": "ceilings",
    "profile": "profile",
    "tuning": "tune",
    "headline": CELLS[1].layer,
    "wide": WIDE[1].layer,
    "adapters": MANY[1].group,
}


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
    machine = {**MACHINE, "device": "cuda", "gpu": "NVIDIA H100", "lora_ext": {"cuda": True}}
    data = {
        "device": {"machine": machine},
        "kernels": {"names": ["wgmma", "pingpong", "in-grid"]},
        "check": {"failed": ""},
        "ceilings": {"tflops": 600.0, "dram_gb_s": 2500.0},
        "profile": {"kernels": [["lora_gemm_sm80", 351.2]]},
        "tune": {"entries": 2, "not_library": 1},
        "ncu": NCU_SAYS,
        "entries": {
            json.dumps(asdict(one), sort_keys=True): made(one, TIMES)
            for made, every in ((synthetic, [*CELLS, *WIDE]), (synthetic_case, MANY))
            for one in every
        },
    }
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(child, "PYTHON", str(tools / "python"))
    monkeypatch.setattr(cells, "headline_cells", lambda: CELLS)
    monkeypatch.setattr(cells, "wide_cells", lambda: WIDE)
    monkeypatch.setattr(cases, "many_cases", lambda: MANY)
    short = [replace(stage, seconds=5.0) for stage in gpu.STAGES]
    monkeypatch.setattr(gpu, "STAGES", short)

    def run(*only, modes=None, seconds=2.0, budget="600"):
        """Exit status and document; `seconds` is the limit of what is to hang."""
        (tmp_path / "modes.json").write_text(json.dumps(modes or {}))
        (tmp_path / "data.json").write_text(json.dumps(data))
        for name in ("_CELL_S", "_COMPILED_S", "_CASE_S", "_SHAPE_S", "_CEILINGS_S"):
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
    assert {result["case"]["id"] for result in document["adapters"]} == {c.id for c in MANY}
    assert document["machine"]["sources"] and document["predictions"]
    kept = {path.name for path in double.out.rglob("*") if path.is_file()}
    assert kept == {"results.json", "report.md", "log.txt"}  # and a golden file and a table: five
    before = (double.out / "log.txt").stat().st_size
    assert double()[0] == 0
    assert "kernels" not in (double.out / "log.txt").read_text()[before:]  # nothing is done twice


@pytest.mark.parametrize("mode", ["hang", "signal", "exit", "garbage"])
@pytest.mark.parametrize("stage", [*COMMANDS, *TASKS])
def test_a_stage_that_goes_wrong_is_said_kept_and_done_again(double, capsys, stage, mode):
    if stage == "profile":
        double("headline")
    name = TASKS.get(stage, stage)
    other = "stress" if stage != "stress" else "kernels"
    status, document = double(stage, other, modes={name: mode})
    found = document["stages"][stage]
    assert status == 1 and found["status"] == "failed"
    log = (double.out / "log.txt").read_text()
    assert f"about to {mode} in {name}" in log
    told = json.dumps([found, *(document.get(k) for k in ("cells", "adapters", "tuned"))])
    ends = {"hang": "stopped after", "signal": "SIGSEGV", "exit": "exit status 3"}
    assert ends.get(mode, "exit status 1") in told
    if mode != "garbage":
        assert f"about to {mode} in {name}" in told or mode == "hang"
    assert document["stages"][other]["status"] == "done"
    if stage in SUITES:  # the other tests have run
        assert "2 passed; second ended its process" in found["summary"]
    assert all(dies(pid) for pid in grandchildren(double.out))
    assert len(grandchildren(double.out)) >= (mode == "hang")
    report = (double.out / "report.md").read_text()
    assert re.search(rf"^\| {stage} +\| failed +\|", report, re.MULTILINE)
    status, document = double(stage)
    assert status == 0 and document["stages"][stage]["status"] == "done"
    every = [*document["cells"], *document.get("adapters", [])]
    assert all(result["status"] == "ok" for result in every)


@pytest.mark.parametrize("stage", ["headline", "wide"])
def test_cells_beside_one_that_faults_are_measured(double, stage):
    status, document = double(stage, modes={TASKS[stage]: "fault"})
    statuses = {result["cell"]["layer"]: result["status"] for result in document["cells"]}
    assert status == 1 and statuses.pop(TASKS[stage]) == "error"
    assert statuses and set(statuses.values()) == {"ok"}


def test_adapters_beside_a_case_that_faults_are_measured(double):
    status, document = double("adapters", modes={TASKS["adapters"]: "fault"})
    statuses = {result["case"]["group"]: result["status"] for result in document["adapters"]}
    assert status == 1 and statuses.pop(TASKS["adapters"]) == "error"
    assert statuses and set(statuses.values()) == {"ok"}
    assert "misaligned" in (double.out / "report.md").read_text()


def test_ours_that_is_wrong_about_many_adapters_fails_the_stage_each_time(double):
    key = json.dumps(asdict(MANY[0]), sort_keys=True)
    double.data["entries"][key] |= {"status": "wrong", "disagreements": {"ours": ["dx is off"]}}
    for _ in range(2):
        status, document = double("adapters")
        found = document["stages"]["adapters"]
        assert status == 1 and found["status"] == "failed"
        assert f"1 of them wrong, such as {MANY[0].id}" in found["summary"]


def test_adapters_go_on_where_a_call_stopped(double, monkeypatch):
    monkeypatch.setattr(cases, "many_cases", lambda: MANY[:1])
    double("adapters")
    before = (double.out / "log.txt").stat().st_size
    monkeypatch.setattr(cases, "many_cases", lambda: MANY)
    monkeypatch.setattr(gpu, "checking", lambda: "of more cases")
    _, document = double("adapters")
    said = (double.out / "log.txt").read_text()[before:]
    assert MANY[1].id in said and MANY[0].id not in said
    assert document["stages"]["adapters"]["summary"] == f"{len(MANY)} of {len(MANY)} cases"


def test_cells_that_failed_come_last_when_the_run_goes_on(double):
    double("headline", modes={CELLS[0].layer: "exit"})
    log = double.out / "log.txt"
    before = log.stat().st_size
    double("headline", "wide")
    said = log.read_text()[before:]
    assert CELLS[0].id in said and CELLS[1].id not in said  # what is measured stays
    assert said.index(WIDE[0].id) < said.index(CELLS[0].id)  # what has not failed goes first


def test_children_that_never_start_fail_their_stage_alone(double):
    status, document = double("ceilings", "stress", modes={"ceilings before ready": "exit"})
    assert status == 1 and document["stages"]["stress"]["status"] == "done"
    assert "before it was ready: exit status 3" in document["stages"]["ceilings"]["summary"]


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


@pytest.mark.parametrize("mode", ["hang", "signal", "exit", "garbage"])
def test_ncu_may_go_wrong_and_the_profile_is_there(double, mode):
    double("headline")
    _, document = double("profile", modes={"ncu": mode})
    found = document["stages"]["profile"]
    assert found["status"] == "done" and found["profiles"] and found["counters"] == []
    assert "ncu counted nothing" in found["summary"]
    assert all(dies(pid) for pid in grandchildren(double.out))


@pytest.mark.parametrize("mode", ["signal", "exit", "garbage"])
def test_a_device_that_no_child_can_describe_ends_the_run_before_it_begins(double, capsys, mode):
    status, document = double(modes={"device": mode})
    assert status == 2 and document is None
    assert "no child could describe the device" in capsys.readouterr().err


def test_a_build_without_kernels_measures_nothing(double, capsys):
    double.data["device"]["machine"]["lora_ext"] = {"cuda": False, "cuda_reason": "No nvcc."}
    status, document = double()
    said = capsys.readouterr().err
    assert status == 2 and document is None
    assert "No nvcc." in said and "nothing to measure" in said


def test_a_device_that_is_not_there_is_said(double, capsys):
    double.data["device"] = {"reason": "torch finds no CUDA device"}
    status, document = double()
    assert status == 2 and document is None and "finds no CUDA" in capsys.readouterr().err


def test_packages_that_are_missing_are_named(double, capsys):
    double.data["device"]["absent"] = ["pytest", "peft"]
    double("stress")
    said = capsys.readouterr().out
    assert "not installed: pytest, peft" in said and "install it first" in said


def test_kernels_that_fail_their_check_are_named(double):
    double.data["check"] = {"failed": "dx is wrong"}
    status, document = double("warmup")
    found = document["stages"]["warmup"]
    assert status == 1 and found["status"] == "failed"
    assert found["summary"] == "3 of 3 kernels checked, 3 failed; 0 of them for many adapters"
    assert "pingpong: dx is wrong" in found["tail"]


def test_kernels_for_many_adapters_are_counted(double):
    double.data["kernels"] = {"names": ["forward 128x64", "forward 128x64 many adapters"]}
    _, document = double("warmup")
    said = document["stages"]["warmup"]["summary"]
    assert said == "2 of 2 kernels checked, 0 failed; 1 of them for many adapters"


def test_kernels_beside_one_that_hangs_are_checked(double):
    _, document = double("warmup", modes={"pingpong": "hang"})
    found = document["stages"]["warmup"]
    assert found["summary"].startswith("3 of 3 kernels checked, 1 failed")
    assert found["tail"][0].startswith("pingpong: stopped after 2 s")


def test_another_build_begins_anew(double, monkeypatch, capsys):
    double("stress")
    monkeypatch.setattr(gpu, "sources", lambda: "of other kernels")
    _, document = double("kernels")
    assert list(document["stages"]) == ["kernels"]
    assert "sources differ" in capsys.readouterr().err
    assert (double.out / "results.json.old").exists()
