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

import matplotlib

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt

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
VARIANTS = ("merged", "ours", "naive")
COLOURS = {"merged": "#555555", "ours": "#c1272d", "naive": "#1f6fb4"}
ROOM = 0.01  # of the merged product's requests


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


def table(rows: list[dict]) -> str:
    lines = [
        "| M x K x N, r | direction | merged | ours | naive | ours beyond one pass and adapters |"
        " DRAM: merged | ours | naive |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        for direction in ("forward", "backward"):
            mine = {
                row["variant"]: row
                for row in rows
                if tuple(row["shape"]) == shape and row["direction"] == direction
            }
            m, k, n, rank = shape
            cells = [f"{m} x {k} x {n}, {rank}", direction]
            cells += [f"{mine[name]['requested'] / 1e6:.0f}" for name in VARIANTS]
            over = mine["ours"]["over"]
            cells.append(f"{100 * over:.2f} %" + ("" if over <= ROOM else " (above 1 %)"))
            cells += [f"{mine[name]['dram'] / 1e6:.0f}" for name in VARIANTS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        mine = [row for row in rows if row["direction"] == direction]
        for index, name in enumerate(VARIANTS):
            chosen = [row for row in mine if row["variant"] == name]
            floor = [row["dram"] for row in mine if row["variant"] == "merged"]
            heights = [row["dram"] / low for row, low in zip(chosen, floor, strict=True)]
            places = [place + (index - 1) * 0.27 for place in range(len(chosen))]
            bars = axes.bar(places, heights, 0.25, color=COLOURS[name], label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        labels = [
            "{} x {}\nx {}, r {}".format(*row["shape"]) for row in mine if row["variant"] == "ours"
        ]
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_title(f"predicted (model of A100's L2): {direction}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("DRAM bytes / the merged product's")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def report(rows: list[dict]) -> str:
    return f"""# Memory traffic, predicted

Megabytes that kernels request of L2, and that reach DRAM under a model of an A100's L2 (40 MiB,
LRU, sectors of 32 bytes). bfloat16, bfloat16 adapters, no dropout. "merged" is our kernel without a
low-rank part; "naive" adds PEFT's passes to it, its skinny products ideal. Forward may ask for one
pass over X, backward for one over dY and one over X, and both for the adapters, beyond merged; the
column says by how much more, in percent of merged.

{table(rows)}

![DRAM bytes](traffic.png)
"""


def main(out: Path) -> None:
    build()
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(trace, SHAPES) for row in found]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, out / "traffic.png")
    (out / "report.md").write_text(report(rows))
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
