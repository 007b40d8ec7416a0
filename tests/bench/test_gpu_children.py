"""Children of `make gpu` hang, crash, print garbage or lack a program, and the run goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import bench_helpers
import pytest
from bench_helpers import dies, is_alive

from benchmarks.gpu import child, children, stages
from benchmarks.gpu.child import Log

# A Python in `make gpu`'s place of one that has torch: -S -E, it starts at once.
QUICK_PYTHON = [sys.executable, "-S", "-E", "-c"]

# Begins a grandchild, whose process id it prints.
BEARS = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "


def new_run(folder, seconds=600.0):
    run = bench_helpers.new_run(folder, seconds=seconds)
    run.log = Log(folder / "log.txt")
    return run


def command_of(code):
    return [*QUICK_PYTHON, code]


def test_a_command_that_hangs_is_stopped_with_its_grandchildren_and_what_it_said_is_kept(tmp_path):
    run = new_run(tmp_path)
    code = BEARS + "import time; print('kernel 17 of 40', end='', flush=True); time.sleep(600)"
    found = stages.run_command(run, command_of(code), 2.0)
    assert found["status"] == "failed"
    assert "stopped after 2 s" in found["summary"] and "kernel 17 of 40" in found["summary"]
    assert dies(int(found["tail"][0]))
    assert "kernel 17 of 40" in (tmp_path / "log.txt").read_text()


def test_a_python_that_hangs_says_where(tmp_path):
    code = "def waits_for_a_kernel():\n    time.sleep(600)\nimport time\nwaits_for_a_kernel()"
    found = stages.run_command(new_run(tmp_path), [sys.executable, "-S", "-c", code], 2.0)
    assert any("waits_for_a_kernel" in line for line in found["tail"])


def test_a_child_that_ignores_everything_but_sigkill_is_killed(tmp_path):
    code = (
        "import signal, time\n"
        "for name in ('SIGABRT', 'SIGTERM', 'SIGINT'):\n"
        "    signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
        "print('deaf', flush=True); time.sleep(600)"
    )
    start = time.monotonic()
    found = stages.run_command(new_run(tmp_path), command_of(code), 2.0)
    assert found["status"] == "failed" and time.monotonic() - start < 60


def test_a_grandchild_that_holds_the_output_open_holds_up_nothing(tmp_path):
    start = time.monotonic()
    found = stages.run_command(new_run(tmp_path), command_of(BEARS), 300.0)
    assert found["status"] == "done" and time.monotonic() - start < 100
    assert dies(int(found["summary"]))


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print(7)", "done", "7"),
        ("print('a case'); raise SystemExit(3)", "failed", "a case (exit status 3)"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "SIGSEGV"),
        ("import os; os.write(1, bytes(range(256)) * 10); os._exit(1)", "failed", "exit status 1"),
        ("print('x' * 10**6)", "done", "x"),
        ("pass", "done", ""),
    ],
)
def test_how_a_command_ended_is_its_result(tmp_path, code, status, said):
    found = stages.run_command(new_run(tmp_path), command_of(code), 60.0)
    assert found["status"] == status and said in found["summary"]
    json.dumps(found, allow_nan=False)
    assert all(line.replace("\t", "").isprintable() for line in found["tail"])
    assert len(found["summary"]) <= 400


def test_a_program_that_is_not_there_is_missing(tmp_path):
    assert stages.run_command(new_run(tmp_path), ["/no/such/program"], 1)["status"] == "missing"


def test_the_last_lines_are_kept_or_as_many_as_asked_for(tmp_path):
    many = command_of("print(*range(50), sep='\\n')")
    assert len(stages.run_command(new_run(tmp_path), many, 60)["tail"]) < 50
    assert len(stages.run_command(new_run(tmp_path), many, 60, kept=50)["tail"]) == 50


def test_a_child_dies_with_its_parent():
    """Of SIGKILL, say, at the end of a command's time: no `finally` runs then."""
    code = (
        "from benchmarks.gpu.child import Child\n"
        f"with Child([{sys.executable!r}, '-S', '-c',\n"
        "            'import os, time; print(os.getpid(), flush=True); time.sleep(600)']) as c:\n"
        "    print(c.line(float('inf')), flush=True)\n"
        "    c.line(float('inf'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=child.ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert dies(pid)


def test_a_log_is_bounded_and_no_disk_stops_it(tmp_path):
    log = Log(tmp_path / "log.txt", most=20)
    for _ in range(10):
        log.write("a line")
    assert 20 <= (tmp_path / "log.txt").stat().st_size < 40
    Log(Path("/dev/full")).write("a line")
    Log(Path("/proc/no/such/folder/log.txt")).write("a line")


# ---- children that are asked ----

# Answers each item by what its "does" says, as child_tasks.py would, or worse.
WORKER = """
import json, os, signal, subprocess, sys, time

def say(answer):
    print("\\n@answer " + json.dumps(answer), flush=True)

print("started", sys.argv[2:], flush=True)
say({"ready": True})
for line in sys.stdin:
    item = json.loads(line)
    does = item["does"]
    print("  variant of", item["number"], flush=True)
    if does == "hang":
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    elif does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif does == "exit":
        os._exit(7)
    elif does == "leave":
        os._exit(0)
    elif does == "fault":
        say({"error": "CUDA error: an illegal memory access", "fault": "CUDA error: an illegal"})
        break
    elif does == "raise":
        say({"error": "ValueError: no"})
    elif does == "garbage":
        print("\\n@answer {\\n@answer [1]\\n@answer {\\"ready\\": true}", flush=True)
        sys.stdout.buffer.write(bytes(range(256)) + b"\\n")
        sys.stdout.flush()
        say({"result": "no object"})
    else:
        say({"result": {"pid": os.getpid(), "number": item["number"]}})
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Puts a program in the place of Python and its module."""

    def install(code):
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable} -S\n{code}")
        path.chmod(0o755)
        monkeypatch.setattr(child, "PYTHON", str(path))

    return install


def items_of(*does, seconds=2.0):
    return [
        children.Item(f"item {number}", {"does": one, "number": number}, seconds)
        for number, one in enumerate(does)
    ]


def asked(run, items, seconds=300.0):
    return {
        item.fields["number"]: answer
        for item, answer in children.each(run, "cell", items, time.monotonic() + seconds)
    }


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("hang", "stopped after 2 s; it last said: "),
        ("crash", "SIGSEGV; it last said: variant of 1"),
        ("exit", "exit status 7; it last said: variant of 1"),
        ("leave", "it ended without an answer"),
        ("fault", "CUDA error: an illegal"),
        ("raise", "ValueError: no"),
        ("garbage", "an answer without a result"),
    ],
)
def test_one_item_that_ends_its_child_costs_no_other(tmp_path, fake_worker, does, said):
    fake_worker(WORKER)
    run = new_run(tmp_path)
    found = asked(run, items_of("ok", does, "ok", "ok"))
    assert sorted(found) == [0, 1, 2, 3]
    assert found[1].error.startswith(said) and found[1].result is None
    assert any("variant of 1" in line for line in found[1].tail)
    others = [found[n].result["pid"] for n in (0, 2, 3)]
    assert others[1] == others[2]  # a child takes many items
    assert (others[0] == others[1]) == (does in ("raise", "garbage"))
    assert not any(is_alive(pid) for pid in others)
    log = (tmp_path / "log.txt").read_text()
    assert log.index("== item 1 ...") < log.index("variant of 1") < log.index("== item 2 ...")
    if does == "hang":
        assert dies(int(next(line for line in found[1].tail if line.isdigit())))


def test_an_item_that_is_killed_because_the_run_ends_is_not_to_blame(tmp_path, fake_worker):
    fake_worker(WORKER)
    run = new_run(tmp_path, seconds=8.0)
    assert asked(run, items_of("hang", "ok", seconds=100.0)) == {}
    assert time.monotonic() >= run.end


def test_no_item_begins_after_the_stage_has_had_its_time(tmp_path, fake_worker):
    fake_worker(WORKER)
    assert asked(new_run(tmp_path), items_of("ok", "ok"), seconds=0.0) == {}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "before it was ready"),
        ("raise SystemExit(1)", "before it was ready"),
        ("print('no protocol')", "before it was ready"),
        ("import time; time.sleep(600)", "not ready in time"),
    ],
)
def test_children_that_never_get_ready_are_given_up(tmp_path, fake_worker, monkeypatch, code, said):
    monkeypatch.setattr(children, "START_S", 1.0 if "sleep" in code else 300.0)
    fake_worker(code)
    with pytest.raises(children.CannotStart, match=said):
        asked(new_run(tmp_path), items_of("ok"))


def test_a_real_worker_measures_and_says_what_is_about_to_run(tmp_path):
    run = new_run(tmp_path)
    run.device = "cpu"
    [(_, answer)] = children.each(
        run, "ceilings", [children.Item("ceilings", {}, 300.0)], time.monotonic() + 300
    )
    assert answer.result["tflops"] > 0 and answer.error == ""
    [(_, answer)] = children.each(
        run, "profile", [children.Item("a call", {"cell": {}}, 300.0)], time.monotonic() + 300
    )
    assert answer.result is None and "TypeError" in answer.error
