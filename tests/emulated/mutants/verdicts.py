"""Who catches a mutant: the list in caught/, and the search for what is not on it.

caught/PROGRAM.tsv has a line for each mutant: its name, then the flavour, seed and outcome of a run
that catches it, or for a harmless one of a clean run that comes by it. That run is tried first. A
mutant is named by the kernel's own text: where that has changed, the runs of the most similar names
that are gone are tried, then all seeds of STEPS.

`python -m emulated.mutants.verdicts [--search] [PROGRAM ...]`, with PYTHONPATH=tests, writes the
lists anew; with --search it does not believe them.
"""

import argparse
import difflib
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulated import mutants
from emulated.programs import build_programs
from emulator import build, run

LISTS = Path(__file__).parent / "caught"

# Searched in this order. Nine seeds see every schedule with every completion once; seed 1 has the
# largest sizes, and takes the longest.
STEPS = [
    ("plain", "2:11"),
    ("race", "2:11"),
    ("plain", "11:29"),
    ("plain", "1:2"),
    ("race", "11:29"),
]
# The whole op has larger cases. Few rows are seldom as many as an instance takes, and the last of
# them the first of its adapter. One of 12 weights has scales in 8 bits and values in float, which
# show the last bit of a scale.
STEPS_OF = {
    "lora_linear_sequence": [("plain", "1:19"), ("race", "1:7"), ("plain", "19:37")],
    "lora_decode": [*STEPS, ("plain", "29:72")],
    "lora_grouped_gemm": [*STEPS, ("plain", "29:60")],
    "lora_grouped_own_weights": [*STEPS, ("plain", "29:90")],
    "lora_grouped_own_weights_sm90a": [*STEPS, ("plain", "29:90")],
    "lora_grouped_segments": [*STEPS, ("plain", "29:170")],
    "lora_grouped_sequence": [*STEPS, ("plain", "29:91")],
    "lora_experts": [*STEPS, ("plain", "29:80")],
    "dequantize": [*STEPS, ("plain", "29:120")],
}
PROGRAMS = list(dict.fromkeys([*mutants.PROGRAMS, *STEPS_OF]))
# What must raise no alarm runs these seeds besides the one that comes by it.
HARMLESS_SEEDS = {"plain": "2:8", "race": "2:5"}
SIMILAR_NAMES = 3
# Seconds of processor time of one launch; the other where one is known never to end. A clean one
# takes less than one.
WATCHDOG = 20
WATCHDOG_OF_KNOWN = 4


@dataclass(frozen=True)
class Known:
    """A line of a list."""

    flavour: str
    seed: int
    outcome: str

    @property
    def seeds(self) -> str:
        return f"{self.seed}:{self.seed + 1}"


@dataclass(frozen=True)
class Verdict:
    """Of one mutant: what it must be, and the run that says so if there is one."""

    mutant: mutants.Mutant
    state: str  # caught, missed, harmless, alarm, not reached, not judged
    by: run.Run | None = None

    @property
    def right(self) -> bool:
        return self.state == ("caught" if self.mutant.caught else "harmless")

    def known(self) -> Known | None:
        if not self.right or self.by is None:
            return None
        return Known(self.by.flavour, self.by.case["seed"], self.by.outcome)


class Clock:
    """Ends searches when they have taken this long together, which begins with the first."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end: float | None = None

    def is_over(self) -> bool:
        if self.end is None:
            self.end = time.monotonic() + self.seconds
        return time.monotonic() >= self.end


def read(program: str) -> dict[str, Known]:
    path = LISTS / f"{program}.tsv"
    if not path.exists():
        return {}
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: Known(flavour, int(seed), outcome) for name, flavour, seed, outcome in rows}


def write(program: str, verdicts: list[Verdict]) -> None:
    """In the order of names, so that a change of text changes few lines."""
    known = {verdict.mutant.name: verdict.known() for verdict in verdicts}
    lines = [
        f"{name}\t{each.flavour}\t{each.seed}\t{each.outcome}\n"
        for name, each in sorted(known.items())
        if each is not None
    ]
    LISTS.mkdir(exist_ok=True)
    (LISTS / f"{program}.tsv").write_text("".join(lines))


def guesses(name: str, known: dict[str, Known], names: set[str]) -> list[Known]:
    """The listed run, or those of the most similar names that no mutant has any more."""
    if name in known:
        return [known[name]]
    gone = [each for each in known if each not in names]
    similar = difflib.get_close_matches(name, gone, SIMILAR_NAMES)
    return list(dict.fromkeys(known[each] for each in similar))


def judge(mutant: mutants.Mutant, tried_first: list[Known], clock: Clock) -> Verdict:
    endless = any(known.outcome == "watchdog" for known in tried_first)

    def runs_of(flavour: str, seeds: str) -> list[run.Run]:
        watchdog = str(WATCHDOG_OF_KNOWN if endless else WATCHDOG)
        arguments = ["--seeds", seeds, "--fault", mutant.name, "--watchdog", watchdog]
        return run.run_program(flavour, mutant.program, *arguments, *mutant.arguments)

    reached = None
    steps = [(known.flavour, known.seeds) for known in tried_first]
    if not mutant.caught:
        steps += HARMLESS_SEEDS.items()
    searched = STEPS_OF.get(mutant.program, STEPS)
    for step, (flavour, seeds) in enumerate([*steps, *searched]):
        if step >= len(steps):
            if reached and not mutant.caught:
                break
            if clock.is_over():
                return Verdict(mutant, "not judged")
        runs = runs_of(flavour, seeds)
        reached = reached or next((each for each in runs if each.case.get("reached", 1)), None)
        if runs[-1].outcome != "clean":
            return Verdict(mutant, "caught" if mutant.caught else "alarm", runs[-1])
    if reached is None:
        return Verdict(mutant, "not reached")
    return Verdict(mutant, "missed" if mutant.caught else "harmless", reached)


def judge_program(program: str, clock: Clock, believe: bool = True) -> list[Verdict]:
    """Of all mutants of a program, in its order; without believing, whatever the list says."""
    flavours = dict.fromkeys(flavour for flavour, _ in STEPS_OF.get(program, STEPS))
    build_programs([(flavour, program) for flavour in flavours])
    todo = mutants.program_mutants(program)
    known = read(program) if believe else {}
    names = {mutant.name for mutant in todo}
    with ThreadPoolExecutor(build.JOBS) as pool:
        return list(
            pool.map(lambda mutant: judge(mutant, guesses(mutant.name, known, names), clock), todo)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="writes who catches each mutant")
    parser.add_argument("programs", nargs="*", default=PROGRAMS, metavar="PROGRAM")
    parser.add_argument("--search", action="store_true", help="all, whatever the lists say")
    arguments = parser.parse_args()
    failed = False
    for program in arguments.programs:
        verdicts = judge_program(program, Clock(math.inf), believe=not arguments.search)
        write(program, verdicts)
        wrong = [verdict for verdict in verdicts if not verdict.right]
        print(f"{program}: {len(verdicts)} mutants, {len(wrong)} not as they should be", flush=True)
        for verdict in wrong:
            print(f"    {verdict.state}: {verdict.mutant.name}")
        failed |= bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(main())
