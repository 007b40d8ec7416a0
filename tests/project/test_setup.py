"""setup.py: what is compiled how, by how many jobs, with a compiler or without."""

import os
import re
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_build_without_a_compiler_says_so(build_ext, tmp_path, monkeypatch):
    command, _ = build_ext
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiler, name in (("", "c++"), ("ccache /nowhere/g++", "/nowhere/g++")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(Exception, match="there is none; install") as caught:
            command.build_extensions()
        assert f"expected a C++ compiler {name!r}" in str(caught.value)


def test_a_long_build_says_what_it_does_and_how_far_it_is(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    (tmp_path / "old.o").touch()
    os.utime(tmp_path / "old.o", (1, 1))
    shown = tmp_path / "terminal"
    plan = setup_py["plan_of"](22, 14, "")
    assert plan == (
        "lora_ext: compiling 22 C++ files and 14 of CUDA kernels, about 19 min with 2 at a time "
        "(MAX_JOBS). LORA_EXT_CUDA=0 leaves the CUDA kernels out."
    )
    assert setup_py["plan_of"](22, 0, "Why.").endswith(
        "22 files, about 3 min with 2 at a time (MAX_JOBS). Why."
    )
    with setup_py["progress_line"](str(tmp_path), 7, 0.05, str(shown), plan):
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "new.o").touch()
        deadline = time.monotonic() + 60
        while "lora_ext: 1 of 7 files compiled after 0.0 min" not in shown.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert shown.read_text().startswith(f"\n{plan}\n")
    with setup_py["progress_line"](str(tmp_path), 7, 0.05, str(tmp_path / "no" / "terminal")):
        pass


def test_every_file_is_compiled_once_and_instruction_sets_apart(setup_py, monkeypatch, tmp_path):
    monkeypatch.setitem(setup_py["units_of"].__globals__, "UNITS", tmp_path)
    compiled = setup_py["units_of"](setup_py["sources"]("**/*.cpp"))
    units = [Path(path) for path in compiled if not path.startswith("csrc/")]
    included = [re.findall('#include "(.*)"', unit.read_text()) for unit in units]
    assert 1 < max(map(len, included)) <= setup_py["MOST_A_UNIT"]
    alone = [path for path in compiled if path.startswith("csrc/")]
    assert {path for path in alone if "/isa_" in path} == set(setup_py["sources"]("cpu/isa_*.cpp"))
    there = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cpp")]
    assert sorted([*(f"csrc/{path}" for unit in included for path in unit), *alone]) == sorted(
        f"csrc/{path}" for path in there
    )


def test_only_a_unit_that_changed_is_written(setup_py, monkeypatch, tmp_path):
    """The date of the others says that their objects are up to date."""
    monkeypatch.setitem(setup_py["units_of"].__globals__, "UNITS", tmp_path)
    sources = setup_py["sources"]("**/*.cpp")
    units = [path for path in setup_py["units_of"](sources) if not path.startswith("csrc/")]
    for path in units:
        os.utime(path, (1, 1))
    setup_py["units_of"]([path for path in sources if path != "csrc/op/check/kernel_set.cpp"])
    changed = [Path(path).name for path in units if Path(path).stat().st_mtime != 1]
    assert changed == ["check_1.cpp"]


def test_no_flag_names_a_processor(setup_py):
    flags = setup_py["CXX_FLAGS"] + setup_py["NVCC_FLAGS"]
    assert not [flag for flag in flags if flag.startswith(("-m", "-Ofast", "-ffast-math"))]


@pytest.mark.parametrize(
    ("cores", "gib", "jobs"), [(16, 128, 16), (16, 4, 4), (16, 20, 10), (2, 3, 1), (1, 1, 1)]
)
def test_jobs_follow_memory_but_not_far_below_the_cores(monkeypatch, setup_py, cores, gib, jobs):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gib * 2**18}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert setup_py["default_jobs"]() == jobs


def test_without_ninja_files_are_compiled_side_by_side(monkeypatch, build_ext):
    command, _ = build_ext
    monkeypatch.setenv("MAX_JOBS", "3")
    together = threading.Barrier(3, timeout=60)

    class Compiler:
        def compile(self, sources, output_dir):
            together.wait()  # for ever, one after the other
            return [f"{output_dir}/{source}.o" for source in sources]

    command.compiler = Compiler()
    command.compile_side_by_side()
    found = command.compiler.compile(["a", "b", "c"], output_dir="out")
    assert found == ["out/a.o", "out/b.o", "out/c.o"]
