"""Every mutant is caught, no control raises an alarm; build/emulator/mutants/ says by whom."""

import pytest

from emulator import build, run
from emulator.mutants import verdicts

pytestmark = pytest.mark.kernels

# For what the lists do not know, in all programs together. The rest is not judged, and red.
SEARCH_SECONDS = 240


@pytest.fixture(scope="session")
def clock():
    return verdicts.Clock(SEARCH_SECONDS)


@pytest.mark.parametrize("program", verdicts.PROGRAMS)
def test_every_mutant_is_caught_and_no_control(program, clock):
    judged = verdicts.judge_program(program, clock)
    assert judged
    folder = build.BUILD / "mutants"
    folder.mkdir(exist_ok=True)
    (folder / f"{program}.md").write_text(table(judged))
    wrong = [f"{each.state}: {each.mutant.name}" for each in judged if not each.right]
    alarms = [each.by.describe() for each in judged if each.state == "alarm"]
    how = f"""replay with build/emulator/plain/{program} --fault NAME
What is not judged is searched, and listed, by: python -m emulator.mutants.verdicts {program}"""
    assert wrong == [], "\n".join([how, *wrong, *alarms])


def headline(caught: run.Run) -> str:
    """The line of the message that says what was wrong."""
    lines = caught.message.splitlines() or [""]
    sanitizer = [line for line in lines if "Sanitizer: " in line or "runtime error:" in line]
    return (sanitizer or lines)[0].replace("|", "\\|")


def table(judged: list[verdicts.Verdict]) -> str:
    lines = ["| mutant | is | in | seed | first line |", "|---|---|---|---|---|"]
    for each in judged:
        cells = [each.mutant.name.replace("|", "\\|")]
        if each.by is None:
            cells += [f"**{each.state}**", "", "", ""]
        else:
            state = each.by.outcome if each.state == "caught" else each.state
            cells += [state, each.by.flavour, str(each.by.case["seed"]), headline(each.by)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
