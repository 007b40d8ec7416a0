"""Counts what layers launch on a GPU, of which none is needed: `make count-launches`.

    PYTHONPATH=tests python scripts/count_launches.py [--calls] [LAYER ...]

The package runs on the emulated CUDA runtime, and neither kernels nor ops of torch are executed.
tests/emulated/cuda/counted.py has the layers. Writes the table of docs/experts.md; with the names
of some layers, or for the calls of each one by one, it only prints.
"""

import argparse
import json
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from emulated.cuda import build as cuda_build  # noqa: E402
from emulated.package import build  # noqa: E402

PAGE = ROOT / "docs" / "experts.md"
HEAD = """\
| layer | weights | card | forward | backward | host reads | bytes | predicted |
|---|---|---|---|---|---|---|---|
"""


def counted(layers: list[str]) -> list[dict]:
    """A row for each layer, kind of weights, card and direction."""
    if torch.version.cuda is not None:
        sys.exit(
            f"expected a torch without CUDA, whose device is emulated, but got {torch.__version__}"
        )
    package = cuda_build.make()
    command = ["-m", "emulated.cuda.counted", *layers]
    done = build.run(command, package=package, PYTHONPATH="tests")
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def us_of(calls: list) -> float:
    return sum(us for *_, us in calls)


def table(rows: list[dict]) -> str:
    lines = []
    for (layer, kind, arch), both in groupby(
        rows, lambda row: [row["layer"], row["kind"], row["arch"]]
    ):
        given = list(both)
        kinds = [Counter(kind for kind, *_ in row["calls"]) for row in given]
        launches = [f"{each['kernel']}+{each['library']}" for each in kinds]
        reads = str(sum(each["host"] for each in kinds))
        moved = sum(size for row in given for *_, size, _ in row["calls"])
        share = moved / sum(row["needed"] for row in given)
        ours, frozen = (sum(map(us_of, (row[who] for row in given))) for who in ("calls", "frozen"))
        over = f"{ours / frozen:.2f}" if frozen else ""
        lines.append([layer, kind, f"{arch / 10:.1f}", *launches, reads, f"{share:.2f}", over])
    return HEAD + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def one_by_one(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        title = [row["layer"], row["kind"], f"{row['arch'] / 10:.1f}", row["direction"]]
        for who in ("calls", "frozen") if row["frozen"] else ("calls",):
            lines.append(" ".join([*title, *(["frozen"] if who == "frozen" else [])]))
            for (kind, name), same in groupby(row[who], lambda call: call[:2]):
                every = list(same)
                moved = sum(size for *_, size, _ in every) / 1e6
                words = f"{len(every):4} {kind:8} {name:24} {moved:10.2f} MB"
                predicted = f" {us_of(every):9.1f} us" if row["frozen"] else ""
                lines.append(f"  {words}{predicted}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="some of the layers")
    parser.add_argument("--calls", action="store_true", help="the calls of each, in their order")
    given = parser.parse_args(arguments)
    rows = counted(given.layers)
    made = table(rows)
    print(one_by_one(rows) if given.calls else made)
    if given.layers or given.calls:
        return
    page = PAGE.read_text()
    PAGE.write_text(re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: made, page))


if __name__ == "__main__":
    main()
