"""Mutants are found in plain text, planted without moving a line, refused where text is gone."""

import subprocess

import pytest

from emulated import mutants, programs
from emulated.mutants.faults import FAULTS
from emulated.mutants.faults.fault import Fault
from emulated.mutants.harmless import HARMLESS
from emulated.mutants.wrap import apply, number
from emulator import build

pytest.importorskip("tree_sitter")
pytest.importorskip("tree_sitter_cpp")

from emulated.mutants import as_named, edits, instrument, rules
from emulated.mutants.source import Source

KERNEL = """
template <class T>
__global__ void __launch_bounds__(128) kernel(int n) {
  for (int i = 0; i < n; ++i) work(i);
#pragma unroll
  for (int i = 0; i < n; ++i) work(i);
  if constexpr (sizeof(T) > 2) work(0);
  const int last = n > 4 ? n : 4;  // two lines
  STATEMENT
}
int on_the_host(int n) { return n < 4 ? n : 4; }
"""


def source(tmp_path, statement: str = "") -> Source:
    path = tmp_path / "file.h"
    path.write_text(KERNEL.replace("STATEMENT", statement))
    return Source(path)


def names(wraps) -> set[str]:
    return {name.removeprefix("file.kernel.") for wrap in wraps for name in wrap.mutants}


ALWAYS = {"i<n:low", "i<n:high", "n>4:always", "n>4:never"}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("", set()),
        ("__syncthreads();", {"__syncthreads:skip"}),
        ("if (n) ptx::cluster_wait();", {"n:always", "n:never", "cluster_wait:skip"}),
        (
            "ptx::cp_async_wait_group<kStages - 2>();",
            {"cp_async_wait_group:skip", "cp_async_wait_group:more"},
        ),
        (
            "ptx::mbarrier_wait(full(n), n ^ 1);",
            {"mbarrier_wait:skip", "mbarrier_wait.parity:other"},
        ),
        (
            "ptx::mbarrier_init(n, 3);",
            {"mbarrier_init:skip", "mbarrier_init.count:low", "mbarrier_init.count:high"},
        ),
        ("const bool b = n == last;", {"n==last:always", "n==last:never"}),
        ("call(n < last);", {f"n<last:{each}" for each in ("always", "never", "low", "high")}),
    ],
)
def test_rules(tmp_path, statement, expected):
    assert names(rules.wraps_of(source(tmp_path, statement))) == ALWAYS | expected


def test_two_of_a_kind_have_two_names(tmp_path):
    found = names(rules.wraps_of(source(tmp_path, "__syncwarp(); __syncwarp();")))
    assert found == ALWAYS | {"__syncwarp:skip", "__syncwarp#2:skip"}


@pytest.mark.parametrize(
    "statement", ["ptx::some_new_instruction();", "const bool seen = ptx::mbarrier_wait(p, 0);"]
)
def test_what_no_rule_covers_is_refused(tmp_path, statement):
    with pytest.raises(ValueError, match="expected ptx::"):
        rules.wraps_of(source(tmp_path, statement))


def fault(*changes: tuple[str, str]) -> Fault:
    return Fault("name", "what", "why", tuple(("file.h", *each) for each in changes))


@pytest.mark.parametrize("old", ["work(1)", "work(i)"])
def test_an_edit_whose_text_is_gone_or_no_longer_unique_is_refused(tmp_path, old):
    with pytest.raises(ValueError, match="expected to find this once"):
        edits.wraps_of(source(tmp_path), [fault((old, "work(2)"))])


PROGRAM = """
#include <cstdio>
__device__ void run(int n) {
  int a = 0;
  a += 1;  // one
  a *= 3;
  if (a > n) a += 5;
  const int b = a - n;
  std::printf("%d %d\\n", b, __LINE__);
}
int main(int, char** words) {
  emulator::plant_fault(words[1]);
  run(2);
}
"""


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("planted", "changes", "printed"),
    [
        ("", (), 6),
        ("file.run.a>n:never", (), 1),
        ("file.run.a>n:high", (), 1),
        ("name", (("a += 1;", "a += 3;"),), 12),
        ("name", (("  a *= 3;\n", ""),), -1),
        ("name", (("  a += 1;  // one\n  a *= 3;\n", "  a *= 3;\n  a += 1;\n"),), -1),
        ("name", (("  if (a > n)", "  a += 1;\n  if (a > n)"),), 7),
        ("name", (("  if (a > n)", "  if (a > 9) a = 0;\n  if (a > n)"),), 6),
        ("name", (("  a *= 3;", "  if (n > 2) a *= 3;"),), -1),
        ("name", (("const int b = a", "const int b = 2 * a"),), 14),
        ("name", (("int a = 0;", "int a = 1;"), ("a - n", "a + n")), 13),
        ("name", (("a - n", "a - 1 - n"),), 5),
    ],
)
def test_a_planted_mutant_runs_and_nothing_moves(tmp_path, planted, changes, printed):
    path = tmp_path / "file.cpp"
    path.write_text(PROGRAM)
    found = Source(path)
    faults = [Fault("name", "", "", tuple(("file.cpp", *each) for each in changes))]
    text = apply(found.text, [*rules.wraps_of(found), *edits.wraps_of(found, faults)])
    (tmp_path / "copy.cpp").write_text(instrument.copy_text(found, text))
    program = tmp_path / "program"
    folders = [f"-I{folder}" for folder in build.FOLDERS]
    words = [*build.CXX, "-std=c++20", "-D__device__=", *folders, str(tmp_path / "copy.cpp")]
    build.run_tool([*words, str(build.EMULATOR / "fault.cpp"), "-o", str(program)])
    done = subprocess.run([program, planted], capture_output=True, text=True, check=True)
    assert done.stdout == f"{printed} {PROGRAM[: PROGRAM.index('__LINE__')].count(chr(10)) + 1}\n"


@pytest.mark.kernels
def test_what_includes_a_copy_compiles_where_nothing_was_built(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILD", tmp_path)
    for module in (mutants, mutants.programs, instrument):
        monkeypatch.setattr(module, "COPIES", tmp_path / "instrumented")
    instrument.write_copies.cache_clear()
    try:
        list_of_mutants = programs.Object("plain", programs.KNOWN_FAULT, kernels=False)
        programs.compile_all([list_of_mutants])
    finally:
        instrument.write_copies.cache_clear()
    assert list_of_mutants.path.exists()


def test_every_edit_finds_its_text():
    planted = [name for source in instrument.sources() for name in edit_names(source)]
    assert set(planted) == {fault.name for fault in FAULTS}


def test_every_edit_is_planted_as_its_fault_says():
    for each in instrument.sources():
        as_named.check(each, FAULTS)


def test_an_edit_that_is_planted_as_another_is_refused(tmp_path, monkeypatch):
    """The part of it that is new is no expression: n - (1 - last) would be planted."""
    found, change = source(tmp_path, "work(n - last);"), fault(("n - last", "n - 1 - last"))
    as_named.check(found, [change])
    monkeypatch.setattr(edits, "is_one", lambda *span: True)
    with pytest.raises(ValueError, match=r"file\.h with this fault to have"):
        as_named.check(found, [change])


def edit_names(source: Source) -> list[str]:
    return [name for wrap in edits.wraps_of(source, FAULTS) for name in wrap.mutants]


def test_every_source_has_a_program_and_every_mutant_a_number():
    instrument.check_complete()
    for name, stems in mutants.PROGRAMS.items():
        assert len(mutants.program_mutants(name)) >= 9, stems
    assert number("") == "0x811c9dc5u"


def test_what_is_called_harmless_is_a_mutant():
    known = {each.name for program in mutants.PROGRAMS for each in mutants.program_mutants(program)}
    assert {key.split(" ")[-1] for key in HARMLESS} <= known
