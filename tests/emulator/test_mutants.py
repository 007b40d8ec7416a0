"""Every mutant is caught, no control raises an alarm; build/emulator/mutants.md says by whom."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from emulator import build, mutants, run

pytestmark = pytest.mark.kernels

# In this order, each until one run is not clean: a few seeds, of which nine see every schedule with
# every completion once, then more. What must raise no alarm runs the first ones.
FIRST = [("plain", "1:10"), ("race", "1:10")]
STEPS = [*FIRST, ("plain", "10:28"), ("race", "10:28")]
# The whole op has larger cases. Few rows are seldom as many as an instance takes, and the last of
# them the first of its adapter.
STEPS_OF = {
    "lora_linear_sequence": [("plain", "1:19"), ("race", "1:7"), ("plain", "19:37")],
    "lora_decode": [*STEPS, ("plain", "28:71")],
}
PROGRAMS = list(dict.fromkeys([*mutants.PROGRAMS, *STEPS_OF]))


@dataclass(frozen=True)
class Verdict:
    mutant: mutants.Mutant
    caught: run.Run | None
    reached: bool


def judge(mutant: mutants.Mutant) -> Verdict:
    reached = False
    for step, (flavour, seeds) in enumerate(STEPS_OF.get(mutant.program, STEPS)):
        if reached and not mutant.caught and step >= len(FIRST):
            break
        arguments = ["--seeds", seeds, "--fault", mutant.name, "--watchdog", "20"]
        runs = run.run_program(flavour, mutant.program, *arguments, *mutant.arguments)
        reached |= any(each.case.get("reached", 1) for each in runs)
        if runs[-1].outcome != "clean":
            return Verdict(mutant, runs[-1], reached)
    return Verdict(mutant, None, reached)


@pytest.fixture(scope="module")
def verdicts():
    """Of all programs' mutants; the table is written whether or not all are caught."""
    steps = [(name, STEPS_OF.get(name, STEPS)) for name in PROGRAMS]
    build.build_programs(
        [(flavour, build.source_of(name)) for name, each in steps for flavour, _ in each]
    )
    todo = [mutant for name in PROGRAMS for mutant in mutants.program_mutants(name)]
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
        "| program | mutant | caught by | in | seed | first line |",
        "|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        mutant, caught = verdict.mutant, verdict.caught
        cells = [mutant.program, mutant.name.replace("|", "\\|")]
        if caught is not None:
            cells += [caught.outcome, caught.flavour, str(caught.case["seed"]), headline(caught)]
        elif not verdict.reached:
            cells += ["**not reached**", "", "", ""]
        else:
            cells += ["**missed**" if mutant.caught else "none, as it should be", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    kinds = [verdict.caught.outcome if verdict.caught else "none" for verdict in verdicts]
    lines += ["", *(f"- {kind}: {kinds.count(kind)}" for kind in sorted(set(kinds)))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_mutant_is_caught_and_no_control(program, verdicts):
    mine = [verdict for verdict in verdicts if verdict.mutant.program == program]
    assert mine
    missed = [v.mutant.name for v in mine if v.mutant.caught and v.caught is None]
    alarms = [v.caught.describe() for v in mine if not v.mutant.caught and v.caught is not None]
    unreached = [v.mutant.name for v in mine if not v.reached]
    assert missed == [], f"not caught: replay with build/emulator/plain/{program} --fault NAME"
    assert alarms == [] and unreached == []
