"""Runs the host programs of the kernels and says how each run ended."""

import json
import os
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from emulator import kept
from emulator.build import BUILD, JOBS, ROOT

# asan: fibers leave stack frames that are never returned from; a planted fault ends a run in the
# middle.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass(frozen=True)
class Run:
    """One run of a kernel.

    `outcome`: clean, result (a wrong number), an emulator::ErrorKind, sanitizer, crash or hang.
    """

    flavour: str
    case: dict
    outcome: str
    message: str

    @property
    def command(self) -> str:
        """What replays exactly this run, from the root of the repository."""
        case = self.case
        words = [f"build/emulator/{self.flavour}/{case['program']}"]
        for name in ("seed", "size", "variant", "schedule", "completion", "resident"):
            words += [f"--{name}", str(case[name])]
        if case["fault"]:
            words += ["--fault", case["fault"]]
        options = " ".join(f"{name}={value}" for name, value in SANITIZER_OPTIONS.items())
        return (options + " " if self.flavour == "asan" else "") + shlex.join(words)

    def describe(self) -> str:
        return f"{self.outcome}: {self.message}\nreplay with: {self.command}"


def execute(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    environment = {**os.environ, **SANITIZER_OPTIONS}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as expired:
        stdout, stderr = ((part or b"").decode() for part in (expired.stdout, expired.stderr))
        return subprocess.CompletedProcess(command, -signal.SIGKILL, stdout, f"{stderr}\ntimeout")


def how_it_ended(done: subprocess.CompletedProcess) -> str:
    """The outcome of a run that ended its program."""
    if "AddressSanitizer" in done.stderr or "runtime error:" in done.stderr:
        return "sanitizer"
    if done.stderr.endswith("timeout"):
        return "hang"
    return "crash"


def run_program(flavour: str, program: str, *arguments: str, timeout: float = 300) -> list[Run]:
    """Runs a built program until its cases are through or one, the last, is not clean.

    All follows from the executable and its arguments, the seeds among them: what the same have
    found before is not run again. What was ended by a clock tells of the machine, too.
    """
    executable = BUILD / flavour / program
    name = kept.key(flavour, program, kept.content(executable), *arguments)
    found = kept.load(name)
    if found is not None:
        return [Run(flavour, *each) for each in found]
    runs = _run_program(flavour, [str(executable), *arguments], timeout)
    if not {"hang", "crash", "watchdog"} & {each.outcome for each in runs}:
        kept.store(name, [(each.case, each.outcome, each.message) for each in runs])
    return runs


def _run_program(flavour: str, command: list[str], timeout: float) -> list[Run]:
    done = execute(command, timeout)
    runs = []
    for line in done.stdout.splitlines():
        try:
            case = json.loads(line)
        except json.JSONDecodeError:  # the program ended within this run
            case = json.loads(line + "}")
            runs.append(Run(flavour, case, how_it_ended(done), done.stderr.strip()))
        else:
            if "outcome" in case:
                runs.append(Run(flavour, case, case["outcome"], case["message"]))
    clean = all(run.outcome == "clean" for run in runs)
    if not runs or clean != (done.returncode == 0):
        raise RuntimeError(
            f"{shlex.join(command)}\nended with status {done.returncode} after {len(runs)} runs:\n"
            f"{done.stderr}"
        )
    return runs


def run_seeds(flavour: str, program: str, seeds: str, *arguments: str) -> list[Run]:
    """The same, of a range of seeds, which all cores share."""
    begin, end = map(int, seeds.split(":"))
    size = -(-(end - begin) // JOBS)
    ranges = [f"{first}:{min(first + size, end)}" for first in range(begin, end, size)]
    with ThreadPoolExecutor(JOBS) as pool:
        found = pool.map(
            lambda some: run_program(flavour, program, "--seeds", some, *arguments), ranges
        )
        return [each for some in found for each in some]
