"""Kernels as nvcc emits them: their PTX decodes whole and runs; no fault of the text passes."""

import re
import subprocess
from functools import cache

import pytest

from emulated.ptx import build as ptx_build
from emulated.ptx import faults, planted, planted_elsewhere, run
from emulator import build

# nvcc of all units takes minutes; `make test-ptx` runs this folder.
pytestmark = [pytest.mark.kernels, pytest.mark.nightly]


@pytest.fixture(scope="session")
def built():
    return ptx_build.make()


def decode(built, *files):
    done = subprocess.run(
        [built["decode"], *map(str, files)], cwd=build.ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_every_instruction_of_every_unit_is_known(built):
    files = [unit.ptx(arch) for unit in ptx_build.units() for arch in ptx_build.ARCHS]
    status, said = decode(built, *files)
    assert status == 0, said
    entries = sum(len(faults.ENTRY.findall(path.read_text())) for path in files)
    assert len(said.splitlines()) == entries > 300


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"add\.s32", "add.sat.s32", "add.sat.s32: this instruction, or one of its modifiers"),
        (r"bar\.sync\s+0;", "bar.red.popc.u32 %r1, 0, %p1;", "bar.red.popc.u32: this instruction"),
        (
            r"(add\.s32\s+%r\d+, )%r\d+",
            r"\1%rd1",
            "expected an operand of 32 bits, but %rd1 has 64",
        ),
        (r"(add\.s32\s+%r\d+, )%r\d+", r"\1%r999999", "expected a register, but got '%r999999'"),
        (
            r"cp\.async\.wait_group 1;",
            "cp.async.wait_group 1, 2;",
            "expected 1 operands, but got 2",
        ),
        (r"bra\s+\$\w+", "bra $no", "no label $no"),
    ],
)
def test_what_is_unknown_is_an_error_that_names_the_line(built, old, new, said):
    fault = faults.Fault("unknown", planted.GEMM_SM80, old, new)
    path = fault.write()
    status, message = decode(built, path)
    assert status == 1 and said in message
    line = int(re.match(rf"{re.escape(str(path))}:(\d+): ", message)[1])
    head, entries = planted.GEMM_SM80.text()
    before = (head + "".join(entries)).splitlines()
    assert path.read_text().splitlines()[line - 1] != before[line - 1]


@pytest.fixture(scope="session")
def clean(built, seeds):
    """Of a program, its runs, each made once."""

    @cache
    def runs_of(program):
        return run.runs(program, *planted.clean(program, seeds.first))

    return runs_of


@pytest.mark.parametrize("program", ptx_build.PROGRAMS)
def test_kernels_as_they_are_equal_float64(program, clean):
    failed = [each.describe() for each in clean(program) if each.outcome != "clean"]
    assert not failed, "\n".join(failed)


def test_all_kernels_run_and_most_of_each(clean, built):
    coverage = run.Coverage()
    for each in (each for program in ptx_build.PROGRAMS for each in clean(program)):
        coverage.add(each)
    of = run.texts(built["decode"])
    little = [key for key in of if coverage.share(key, of) < planted.LEAST_OF_EACH]
    report = coverage.report(of)
    assert not little, report
    missing = sum(map(len, coverage.missing(of).values()))
    assert missing <= planted.MOST_MISSING, report


@pytest.mark.parametrize(
    "fault", [*planted.FAULTS, *planted_elsewhere.FAULTS], ids=lambda fault: fault.name
)
def test_each_fault_of_the_text_is_seen(fault, built):
    found = run.run_fault(fault)
    assert found.outcome != "clean", fault.name
