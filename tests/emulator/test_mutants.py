"""Every mutant of every specimen is caught; by whom is written to build/emulator/mutants.md."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from emulator import build, mutants, run

pytestmark = pytest.mark.kernels

# In this order, each until one run is not clean. Nine seeds see every schedule with every
# completion once.
STEPS = [("plain", "1:28"), ("race", "1:28"), ("asan", "1:28")]


@dataclass(frozen=True)
class Verdict:
    mutant: mutants.Mutant
    caught: run.Run | None
    reached: bool


def judge(mutant: mutants.Mutant) -> Verdict:
    reached = False
    for flavour, seeds in STEPS:
        arguments = ["--seeds", seeds, "--fault", mutant.name, "--watchdog", "20"]
        runs = run.run_specimen(flavour, mutant.specimen, *arguments)
        reached |= any(each.case.get("reached", 1) for each in runs)
        if runs[-1].outcome != "clean":
            return Verdict(mutant, runs[-1], reached)
    return Verdict(mutant, None, reached)


@pytest.fixture(scope="module")
def verdicts():
    """Of all specimens' mutants; the table is written whether or not all are caught."""
    sources = [build.source_of(name) for name in mutants.SOURCES]
    build.build_programs([(flavour, source) for flavour, _ in STEPS for source in sources])
    todo = [mutant for name in mutants.SOURCES for mutant in mutants.mutants(name)]
    with ThreadPoolExecutor(build.JOBS) as pool:
        judged = list(pool.map(judge, todo))
    (build.BUILD / "mutants.md").write_text(table(judged))
    return judged


def headline(caught: run.Run) -> str:
    """The line of the message that says what was wrong."""
    lines = caught.message.splitlines() or [""]
    sanitizer = [line for line in lines if "Sanitizer: " in line or "runtime error:" in line]
    return (sanitizer or lines)[0].replace("|", "\\|")


def table(verdicts: list[Verdict]) -> str:
    lines = [
        "| specimen | mutant | caught by | in | seed | first line |",
        "|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        mutant, caught = verdict.mutant, verdict.caught
        cells = [mutant.specimen, mutant.name]
        if caught is None:
            reached = "speed only" if mutant.name in mutants.SPEED_ONLY else "**missed**"
            cells += [reached if verdict.reached else "**not reached**", "", "", ""]
        else:
            cells += [caught.outcome, caught.flavour, str(caught.case["seed"]), headline(caught)]
        lines.append("| " + " | ".join(cells) + " |")
    kinds = [verdict.caught.outcome if verdict.caught else "not caught" for verdict in verdicts]
    lines += ["", *(f"- {kind}: {kinds.count(kind)}" for kind in sorted(set(kinds)))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("specimen", mutants.SOURCES)
def test_every_mutant_is_caught(specimen, programs, verdicts):
    mine = [verdict for verdict in verdicts if verdict.mutant.specimen == specimen]
    missed = {verdict.mutant.name for verdict in mine if verdict.caught is None}
    harmless = {verdict.mutant.name for verdict in mine} & mutants.SPEED_ONLY
    assert mine
    assert missed == harmless, (
        f"not caught: {missed - harmless}, caught though only slower: {harmless - missed};"
        f" replay with build/emulator/race/{specimen} --fault NAME"
    )
