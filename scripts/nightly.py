"""What takes long, in slices of at most four minutes on two cores.

    python scripts/nightly.py [--record] [--seed N] [SLICE ...]    # all of them by default
    python scripts/nightly.py --turn N                             # one: each has its turn

All slices run, even where one has failed; the exit status is 1 if any has. `make nightly` runs all
and keeps what each found, and on what, in benchmarks/results/nightly.json (--record), which
docs/verification.md shows. `.ci/run` gives one its turn, by the number of commits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "nightly.json"

# Other projects' packages, tools, and what judges kernels: what make puts into the environment.
PACKAGES, TOOLS, ORACLES = ".integrations", ".tools", ".kernel-oracles"
# Folders whose tests compare bits or errors of products.
PRODUCTS = "tests/op tests/contract tests/experts tests/peft tests/pool tests/quantized"


class Slice(NamedTuple):
    """A command, in which PYTHON, MAKE and SEED are replaced.

    Attributes:
        needs: what make puts into the environment before.
        environment: variables of the command.
    """

    command: str
    needs: tuple[str, ...] = (".extras",)
    environment: dict[str, str] | None = None


def pytest(words: str, *needs: str, **environment: str) -> Slice:
    needs = needs or (".extras",)
    return Slice(f"PYTHON -m pytest -n auto --dist loadfile {words}", needs, environment)


def sanitized(words: str) -> Slice:
    """Under sanitizers; about three minutes are the build."""
    return Slice(f"MAKE sanitize ARGS='-n auto --dist loadfile {words}'")


def parts(
    name: str, number: int, words: str, *needs: str, kind=pytest, **environment: str
) -> dict[str, Slice]:
    """Slices of the same tests."""
    return {
        f"{name} {i}/{number}": kind(f"{words} --part {i}/{number}", *needs, **environment)
        for i in range(1, number + 1)
    }


def fresh_clone(target: str) -> Slice:
    words = f"-m nightly tests/project/test_fresh_clone.py -k '[{target}]'"
    return pytest(words, PACKAGES, TOOLS)


DAILY = "-m 'not nightly and not kernels'"
FIRST = "-m 'not rest and not nightly and not kernels'"
NIGHTLY = "-m 'nightly and not kernels'"
PROGRAMS = [path.stem for path in (ROOT / "tests/emulated/mutants/caught").glob("*.tsv")]
SLICES = {
    **parts("joints", 24, f"{NIGHTLY} tests/contract/test_joints.py"),
    **{
        f"fresh clone: {each}": fresh_clone(each)
        for each in ("lint", "sass", "docs", "wheel", "gpu")
    },
    # What selects other code in torch's libraries, and in torch.
    **parts("MKL by AVX2", 6, f"{DAILY} {PRODUCTS}", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    **parts("oneDNN by AVX2", 6, f"{DAILY} {PRODUCTS}", ONEDNN_MAX_CPU_ISA="AVX2"),
    **parts("oneDNN by AVX-512", 6, f"{DAILY} {PRODUCTS}", ONEDNN_MAX_CPU_ISA="AVX512_CORE"),
    **parts("torch by SSE", 6, f"{DAILY} {PRODUCTS}", ATEN_CPU_CAPABILITY="default"),
    **{
        name: each
        for seed in range(1, 11)
        for name, each in parts(
            f"another library {seed}", 2, f"{FIRST} {PRODUCTS} --other-library {seed}"
        ).items()
    },
    **parts(
        "kernels",
        24,
        "-m kernels emulator tests/emulated --ignore tests/emulated/ptx --first-seed SEED",
        ORACLES,
    ),
    **parts("PTX", 16, "-m kernels tests/emulated/ptx", ORACLES),
    "trainers": pytest(f"{NIGHTLY} tests/peft/test_peft_trainers.py", PACKAGES),
    "DeepSpeed": pytest(f"{NIGHTLY} tests/contract/test_deepspeed.py", PACKAGES),
    "image models": pytest(f"{NIGHTLY} tests/peft/test_peft_diffusers.py", PACKAGES),
    "PEFT's suite": pytest(f"{NIGHTLY} tests/peft/test_peft_suite.py", PACKAGES),
    "pool and layers": pytest(f"{NIGHTLY} tests/pool tests/layers"),
    **parts("sequences", 2, f"{NIGHTLY} tests/contract/test_joints_in_sequence.py"),
    "QLoRA": pytest(f"{NIGHTLY} tests/quantized/test_qlora.py", PACKAGES),
    "quantised bases": pytest("tests/quantized tests/peft/test_peft_quantized.py", PACKAGES),
    **{
        f"mutants: {name}": Slice(
            f"PYTHON -m emulated.mutants.verdicts --search {name}",
            (ORACLES,),
            {"PYTHONPATH": "tests"},
        )
        for name in sorted(PROGRAMS)
    },
    **parts("sanitizers", 5, "tests/op tests/cpu", kind=sanitized),
    "ends of torch and Python": Slice("MAKE test-ends"),
    "the newest": Slice("MAKE test-latest"),
    "CUDA with the newest torch": Slice("MAKE test-newest KERNELS=1"),
}


def run(name: str, seed: int) -> dict:
    """Runs a slice; what there is to keep of it."""
    command, needs, environment = SLICES[name]
    make = f"make VENV={shlex.quote(sys.prefix)}"
    meanings = {"PYTHON": shlex.quote(sys.executable), "MAKE": make, "SEED": str(seed)}
    for word, meaning in meanings.items():
        command = " ".join(meaning if each == word else each for each in command.split(" "))
    print(f"==== {name}: {command}", flush=True)
    started = time.monotonic()
    targets = [f"{sys.prefix}/{each}" for each in needs]
    status = subprocess.call(f"{make} {' '.join(targets)}", shell=True, cwd=ROOT)
    if status == 0:
        words = {**os.environ, **(environment or {})}
        status = subprocess.call(command, shell=True, cwd=ROOT, env=words)
    minutes = (time.monotonic() - started) / 60
    print(f"==== {name}: {'failed' if status else 'passed'}, {minutes:.1f} minutes", flush=True)
    machine = describe("cpu")
    return {
        "passed": status == 0,
        "minutes": round(minutes, 1),
        "date": datetime.date.today().isoformat(),
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "torch": machine["versions"]["torch"],
        "python": machine["versions"]["python"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="runs what takes long, in slices")
    parser.add_argument("slices", nargs="*", metavar="SLICE", help="all by default")
    parser.add_argument("--turn", type=int, help="run the slice whose turn this is")
    parser.add_argument("--seed", type=int, help="the first seed of kernels; by default a new one")
    parser.add_argument("--record", action="store_true", help=f"keep the results in {RECORD.name}")
    parser.add_argument("--list", action="store_true", help="print the slices' names")
    arguments = parser.parse_args()
    names = list(SLICES)
    if arguments.list:
        print(*names, sep="\n")
        return 0
    if arguments.turn is not None:
        chosen = [names[arguments.turn % len(names)]]
    else:
        chosen = arguments.slices or names
    if unknown := set(chosen) - set(names):
        parser.error(f"expected slices that --list prints, but got {sorted(unknown)}")
    seed = arguments.seed or random.randrange(1, 2**15)
    print(f"seeds from {seed} on: make nightly SEED={seed} has them again", flush=True)
    failed = []
    for name in chosen:
        found = run(name, seed)
        failed += [] if found["passed"] else [name]
        if arguments.record:
            kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            RECORD.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")
    if failed:
        print("failed:", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
