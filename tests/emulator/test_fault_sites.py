"""Every barrier, fence, wait, count and predicate of the specimens carries a fault site."""

import re

import pytest

from emulator import build, mutants


@pytest.mark.parametrize("specimen", mutants.SOURCES)
def test_all_synchronisation_carries_a_fault_site(specimen):
    assert mutants.unguarded(specimen) == []
    assert len(mutants.mutants(specimen)) >= 9


@pytest.mark.parametrize(
    "statement",
    [
        "__syncthreads();",
        "ptx::cp_async_wait_group<kStages - 2>();",
        "ptx::mbarrier_wait(full(slot), parity);",
        "if (threadIdx.x == 0) sum = 1;",
        "for (int i = 0; i < steps; ++i) sum += i;",
        "const int last = first < n ? first : n;",
        "ptx::some_new_instruction();",
    ],
)
def test_a_statement_without_a_site_is_found(statement, monkeypatch):
    text = "__device__ void kernel() {\n  int sum = 0;\n  STATEMENT\n}\n"
    monkeypatch.setattr(
        mutants, "sources", lambda specimen: {"kernel.h": text.replace("STATEMENT", statement)}
    )
    assert [problem.split(":")[:2] for problem in mutants.unguarded("any")] == [["kernel.h", "3"]]


def test_a_guarded_statement_is_accepted(monkeypatch):
    text = """__device__ void kernel() {
  if (Fault::swap("a")) {
    ptx::cp_async_wait_group<2>();
  } else if (!Fault::skip("b")) {
    ptx::cp_async_wait_group<1>();
  } else {
    __syncthreads();
  }
  for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(i, Fault::count("c", 1, 0, 2));
}
"""
    monkeypatch.setattr(mutants, "sources", lambda specimen: {"kernel.h": text})
    assert mutants.unguarded("any") == []
    names = [mutant.name for mutant in mutants.mutants("any")]
    assert names == ["a", "b", "c:low", "c:high"]


def test_the_documented_table_lists_the_mutants_of_the_source():
    table = (build.ROOT / "docs" / "emulation-mutants.md").read_text()
    documented = re.findall(r"^\| (\w+) \| (\S+) \| [a-z_ ]+ \|", table, re.MULTILINE)
    written = [mutant for name in mutants.SOURCES for mutant in mutants.mutants(name)]
    assert documented[1:] == [
        (mutant.specimen, mutant.name) for mutant in written
    ]  # after the heading
    for document, kernels in {"emulation": False, "kernels": True}.items():
        text = (build.ROOT / "docs" / f"{document}.md").read_text()
        mine = [each for each in written if mutants.of_package(each.specimen) == kernels]
        caught = sum(each.name not in mutants.SPEED_ONLY for each in mine)
        assert f"{caught} of {len(mine)} caught" in text
