"""The replay against kernels of others whose rates are published.

scripts/published_loops.json has their main loops in short, as this counter read them from their
machine code (their code is not here), and what their authors measured, with its source. A rate is a
share of the card's tensor rate at the stated clock, over the whole product: waves of tiles, before
each the first stage's way from DRAM, unless the kernel is persistent, and after it an epilogue,
published in cycles or taken as the planner takes it, 128 of k.

Entries that say what puts them `outside` are further off than ERROR: what the replay leaves out.

    python scripts/sass_published.py        prints the table of docs/main_loops.md
"""

import json
from collections.abc import Iterator
from pathlib import Path

from sass_pipes import CARDS, SMSPS
from sass_replay import replay
from sass_step import Op, Replayed, Ring, op_named

FILE = Path(__file__).with_name("published_loops.json")
EPILOGUE_DEPTH = 128  # csrc/plan/plan_prediction.cpp
ERROR = 0.07


def in_short(ops: list[Op]) -> str:
    """ "3*hmma:2048/1 bar/5": runs of equal instructions with their number."""
    runs: list[tuple[str, int]] = []
    for op in ops:
        if runs and runs[-1][0] == op.text:
            runs[-1] = op.text, runs[-1][1] + 1
        else:
            runs.append((op.text, 1))
    return " ".join(text if count == 1 else f"{count}*{text}" for text, count in runs)


def ops_in(text: str) -> Iterator[Op]:
    for word in text.split():
        count, _, name = word.rpartition("*")
        yield from [op_named(name)] * int(count or 1)


def replayed(entry: dict) -> Replayed:
    ring = Ring(*entry["ring"]) if "ring" in entry else None
    card = CARDS[entry["card"]]
    return replay(tuple(ops_in(entry["ops"])), entry["warps"], card, entry["blocks"], ring)


def predicted(entry: dict) -> float:
    """The share of the card's tensor rate that the whole product should reach."""
    card, done = CARDS[entry["card"]], replayed(entry)
    products = SMSPS * (card.wgmma_products if "hgmma" in entry["ops"] else card.products)
    (m, n, k), (rows, columns) = entry["problem"], entry["tile"]
    tiles = -(-m // rows) * -(-n // columns)
    waves = tiles / (entry.get("sms", card.sms) * entry["blocks"])
    if not entry.get("active"):  # else measured over the cycles in which SMs had work
        waves = -(-waves // 1)
    tile = rows * columns * entry["blocks"] / products  # cycles for one of k
    steps = k / entry["step"]
    epilogue = entry.get("epilogue", EPILOGUE_DEPTH * tile)
    prologue = 0 if entry.get("persistent") else card.dram_latency + done.needs["L2"]
    cycles = waves * (prologue + steps * done.cycles + epilogue)
    return m * n * k / (products * card.sms) / cycles


def read() -> list[dict]:
    return json.loads(FILE.read_text())


def table() -> str:
    columns = ["kernel", "card", "published", "GHz", "of the tensor rate", "replayed loop"]
    columns += ["predicted", "error"]
    lines = [columns, ["---"] * len(columns)]
    for entry in read():
        found, published = predicted(entry), entry["published"]
        cells = [f"[{entry['name']}]({entry['source']})", entry["card"], entry["figure"]]
        cells += [entry["clock"], f"{published:.3f}", f"{replayed(entry).efficiency:.3f}"]
        lines.append([*cells, f"{found:.3f}", f"{100 * (found / published - 1):+.1f} %"])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
