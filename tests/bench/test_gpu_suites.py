"""Suites of tests under `make gpu`: what one test does to its process, and going on without it."""

import time

import pytest
from test_gpu_children import new_run

from benchmarks.gpu import suites

TESTS = """
import os, signal, sys, time
import pytest

def test_first(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n): assert n == 1, "two is wrong"

def test_skipped(): pytest.skip("nothing to do")

def test_hangs():
    print("captured, as ever")
    time.sleep(600)

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)

def test_exits(): os._exit(0)

class Device:
    \"\"\"torch's, in a state that every call reports.\"\"\"
    class cuda:
        is_initialized = staticmethod(lambda: True)
        @staticmethod
        def synchronize(): raise RuntimeError("CUDA error: misaligned address\\nmore")

def test_faults(monkeypatch):
    sys.modules["torch"] = Device
    assert False

def test_last(): pass
"""


def suite(run, folder, *chosen, seconds=300.0, test_s=30.0, before=None):
    path = folder / "test_suite.py"
    path.write_text(TESTS)
    own = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={folder}", str(path)]
    chosen = ["-k", " or ".join(chosen)] if chosen else []
    return suites.run_tests(run, [*own, *chosen], seconds, test_s, before=before)


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


@pytest.mark.slow
def test_tests_that_end_their_process_cost_no_other(run, tmp_path):
    found = suite(run, tmp_path, test_s=5.0)
    assert found["status"] == "failed"
    said = found["summary"]
    assert said.startswith("3 passed; 1 failed; 1 skipped")
    for name, how in {
        "test_hangs": "stopped after 5 s",
        "test_crashes": "SIGSEGV",
        "test_exits": "exit status 0",
        "test_faults": "CUDA error: misaligned address",
    }.items():
        assert f"{name} ended its process: {how}" in said
    assert "failed: test_suite.py::test_wrong[2]" in said
    log = (tmp_path / "log.txt").read_text()
    assert "two is wrong" in log and "in test_hangs" in log  # the traceback of the hang


def test_a_suite_that_passes_is_done(run, tmp_path):
    found = suite(run, tmp_path, "first", "last")
    assert (found["status"], found["summary"]) == ("done", "2 passed")


def test_a_suite_of_which_nothing_passes_is_not_done(run, tmp_path):
    found = suite(run, tmp_path, "skipped")
    assert found["status"] == "failed" and found["summary"].startswith("nothing passed: 1 skipped")
    found = suite(run, tmp_path, "no_such_test")
    assert found["status"] == "failed" and "no test began; exit status 5" in found["summary"]


def test_a_suite_that_is_out_of_time_goes_on_next_time(run, tmp_path):
    found = suite(run, tmp_path, "first", "hangs", "last", seconds=15.0, test_s=600.0)
    assert found["status"] == "partial" and list(found["ended"].values()) == ["passed"]
    assert found["summary"].startswith("stopped after 15 s in test_suite.py::test_hangs; 1 passed")
    start = time.monotonic()
    found = suite(run, tmp_path, "first", "last", before=found["ended"])
    assert (found["status"], found["summary"]) == ("done", "2 passed")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("begin test_suite.py::test_first") == 1
    assert time.monotonic() - start < 300
