"""`make traffic`: bytes that the kernels ask for, and DRAM bytes under a model of L2.

    python -m benchmarks.traffic [OUT]     default: benchmarks/results/l2-model-a100/traffic

Needs a C++ compiler and no GPU: trace.cpp walks over the tiles of the planned kernels, on an A100.
Predicted, not measured: nothing here is a counter of a device.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import report, results

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "l2-model-a100" / "traffic"
PROGRAM = ROOT / "build" / "trace"
SOURCES = (
    "benchmarks/traffic/trace.cpp",
    "csrc/plan/plan.cpp",
    "csrc/plan/plan_prediction.cpp",
    "tests/emulator/counts/l2_model.cpp",
)

# M, K, N, r
SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (4096, 4096, 11008, 64),
    (2048, 1024, 1024, 16),
)
MACHINE = {"name": "A100, by a model of its L2"}


def build() -> Path:
    PROGRAM.parent.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    flags = ["-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    sources = [str(ROOT / source) for source in SOURCES]
    subprocess.run([*compiler, *flags, *sources, "-o", str(PROGRAM)], check=True)
    return PROGRAM


def trace(shape: tuple[int, int, int, int]) -> list[dict]:
    """A row for each direction and variant, with the shape and the bound of the requests."""
    done = subprocess.run([PROGRAM, *map(str, shape)], check=True, capture_output=True, text=True)
    rows = [{"shape": shape, **json.loads(line)} for line in done.stdout.splitlines()]
    merged = {row["direction"]: row["requested"] for row in rows if row["variant"] == "merged"}
    for row in rows:
        bound = merged[row["direction"]] + row["passes"] + row["adapters"]
        row["over"] = (row["requested"] - bound) / merged[row["direction"]]
    return rows


def main(arguments: list[str]) -> int:
    """Exit status 1 if a file could not be written, else 0."""
    out = Path(arguments[0]) if arguments else OUT
    build()
    document = results.new_document("traffic", MACHINE)
    with ThreadPoolExecutor(2) as pool:
        document["rows"] = [row for found in pool.map(trace, SHAPES) for row in found]
    document["complete"] = True
    return 0 if report.publish(document, out / "results.json") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
