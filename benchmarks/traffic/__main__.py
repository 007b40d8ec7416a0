"""`make traffic`: bytes that the kernels ask for, and DRAM bytes under a model of L2.

    python -m benchmarks.traffic [OUT]     default: benchmarks/results/l2-model-a100/traffic

Needs a C++ compiler and no GPU: trace.cpp walks over the tiles of the planned kernels, on an A100,
and trace_grouped.cpp over those for many adapters, trace_decode.cpp over those of few rows, whose
figures are printed.
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
GROUPED = ROOT / "build" / "trace_grouped"
DECODE = ROOT / "build" / "trace_decode"
SOURCES = (
    "csrc/plan/plan.cpp",
    "csrc/plan/plan_prediction.cpp",
    "csrc/plan/decode_plan.cpp",
    "csrc/plan/grouped_plan.cpp",
    "tests/emulator/counts/l2_model.cpp",
)

# M, K, N, r
SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (4096, 4096, 11008, 64),
    (2048, 1024, 1024, 16),
)
# And so many adapters, in ranges of rows.
GROUPED_SHAPES = ((8192, 4096, 4096, 16, 64),)
# Few rows, all of one adapter or each with its own.
DECODE_SHAPES = tuple(
    (rows, width, width, 16, adapters)
    for width in (4096, 8192)
    for rows, adapters in ((1, 1), (8, 1), (64, 1), (8, 8), (64, 64))
)
MACHINE = {"name": "A100, by a model of its L2"}


def build() -> None:
    PROGRAM.parent.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    folders = (ROOT / "csrc", ROOT / "tests", ROOT)
    flags = ["-std=c++20", "-O2", *(f"-I{folder}" for folder in folders)]
    sources = [str(ROOT / source) for source in SOURCES]
    for program in (PROGRAM, GROUPED, DECODE):
        main = str(ROOT / "benchmarks" / "traffic" / f"{program.name}.cpp")
        subprocess.run([*compiler, *flags, main, *sources, "-o", str(program)], check=True)


def traced(program: Path, shape: tuple[int, ...]) -> list[dict]:
    done = subprocess.run([program, *map(str, shape)], check=True, capture_output=True, text=True)
    return [{"shape": shape, **json.loads(line)} for line in done.stdout.splitlines()]


def trace(shape: tuple[int, int, int, int]) -> list[dict]:
    """A row for each direction and variant, with the shape and the bound of the requests."""
    rows = traced(PROGRAM, shape)
    merged = {row["direction"]: row["requested"] for row in rows if row["variant"] == "merged"}
    add_over(rows, merged)
    return rows


def trace_grouped(shape: tuple[int, int, int, int, int]) -> list[dict]:
    """The same of many adapters: of each direction merged, as for one adapter, and grouped."""
    rows = [row for row in traced(PROGRAM, shape[:4]) if row["variant"] == "merged"]
    merged = {row["direction"]: row["requested"] for row in rows}
    rows += traced(GROUPED, shape)
    add_over(rows, merged)
    return rows


def trace_decode(shape: tuple[int, int, int, int, int]) -> dict:
    """Bytes asked for of each kind, what reaches DRAM, and what must at least (once)."""
    [row] = traced(DECODE, shape)
    return row


def decode_table() -> str:
    """The figures that docs/decode.md has, in megabytes."""
    columns = ["K = N", "rows", "adapters", "W", "X", "adapters'", "partial sums, T", "beside W"]
    columns.append("DRAM, beyond once")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for shape in DECODE_SHAPES:
        row = trace_decode(shape)
        beside = (row["x"] + row["factors"] + row["sums"]) / row["w"]
        beyond = row["dram"] / row["once"] - 1
        sizes = [shape[1], shape[0], shape[4]]
        kinds = [f"{row[kind] / 1e6:.1f}" for kind in ("w", "x", "factors", "sums")]
        cells = [*map(str, sizes), *kinds, f"{100 * beside:.0f} %", f"{100 * beyond:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_over(rows: list[dict], merged: dict[str, int]) -> None:
    for row in rows:
        bound = merged[row["direction"]] + row["passes"] + row["adapters"]
        row["over"] = (row["requested"] - bound) / merged[row["direction"]]


def main(arguments: list[str]) -> int:
    """Exit status 1 if a file could not be written, else 0."""
    out = Path(arguments[0]) if arguments else OUT
    build()
    document = results.new_document("traffic", MACHINE)
    with ThreadPoolExecutor(2) as pool:
        document["rows"] = [row for found in pool.map(trace, SHAPES) for row in found]
        grouped = [row for found in pool.map(trace_grouped, GROUPED_SHAPES) for row in found]
    document["complete"] = True
    print("\n".join(map(json.dumps, grouped)))
    print(decode_table())
    return 0 if report.publish(document, out / "results.json") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
