"""The report on batches of many adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import markdown
from ..markdown import milliseconds, peak_columns, present, quotient, ratio_columns, table, table_of
from ..results import Document, Row, is_disturbed, ratio
from ..shapes import FORWARD, STEP
from ..variants import floor_of
from .variants import LABELS, PEERS

# (mode, rows, limit of ours over the floor) of bfloat16, 32 adapters in ranges, without AMX.
LIMITS = ((FORWARD, 32, 1.4), (FORWARD, 256, 1.15), (FORWARD, 2048, 1.08))

WAYS = """\
Each row of x uses one of the adapters, as many rows each; "mixed": in no order. Variants take turns
in one process, in another order each round; figures are medians of ratios within a round. merged: a
linear layer of the same size, which cannot mix adapters. frozen: its step. ours: lists of factors
and an index; ranges: with the ends of ranges in its place. one adapter: the op with one for all
rows. loop: the base once, then adapter by adapter the rows that are its own, as PEFT's mixed batch
does, which has no training; here with gradients. grouped_mm: two grouped products on stacked
factors; mixed rows are sorted before and brought back. gather: a copy of the factors for each row,
as vLLM on a CPU. bmm: where every adapter has as many rows, in order. Dropout of a step is our own
in ours and torch's in the peers. Before it is timed, each is compared with the loop, without
dropout. "!": fewer than three samples without other processes in the way."""
_METHOD = f"{WAYS}\nx and the upstream gradient rotate through 32 MiB."


def rows_of(every: Sequence[Row], **wanted: Any) -> list[Row]:
    """Those of cases with these fields."""
    return [
        row for row in every if all(row["case"][name] == value for name, value in wanted.items())
    ]


def times(
    rows: Sequence[Row],
    mode: str,
    key: str = "timing",
    floor: str = "",
    labels: Mapping[str, str] = LABELS,
) -> str:
    """Each variant's time as a multiple of the floor's.

    key: "timing" for calls, "graph" for replays of CUDA graphs
    floor: the mode's, unless another one is named
    """
    floor = floor or floor_of(mode)
    rows = [row for row in rows if floor in row.get(key, {})]
    others = {name: label for name, label in labels.items() if name != floor}
    mark = lambda row: "!" if is_disturbed(row) else ""  # noqa: E731
    columns = [("case", lambda row: row["case"]["id"].removeprefix(mode + " "))]
    columns += [(floor, lambda row: milliseconds(row[key][floor]["ms"]) + mark(row))]
    columns += ratio_columns(present(rows, others, key), floor, key, ("ours",))
    return table_of(rows, columns)


def targets(document: Document) -> list[list[str]]:
    """What, limit, measured, verdict; cells that were disturbed or not measured say so."""
    build = document["machine"]["lora_ext"]
    has_amx = str(build.get("cpu_isa")) == "amx"
    rows = []

    def add(what: str, row: Row | None, over: str, under: str, limit: float) -> None:
        found = ratio(row, over, under) if row and not is_disturbed(row) else None
        verdict = "not measured" if found is None else "pass" if found.median <= limit else "MISS"
        rows.append([what, f"{limit:g}x", quotient(found, True), verdict])

    ranges = {"layout": "ranges", "adapters": 32, "dtype": "bfloat16", "group": "target"}
    for mode, number, limit in LIMITS:
        row = next(iter(rows_of(document["cases"], mode=mode, rows=number, **ranges)), None)
        if not has_amx:
            add(f"{mode}, {number} rows, over merged", row, "ours", "merged", limit)
        for peer in PEERS if has_amx else ():
            if row and peer in row["timing"] and peer != "loop_ours":
                add(f"{mode}, {number} rows, over {LABELS[peer]}", row, "ours", peer, 1.0)
    step = next(iter(rows_of(document["cases"], mode=STEP, rows=256, **ranges)), None)
    add("step, 256 rows, dropout, over a loop", step, "ours", "loop", 0.5)
    add("step, 256 rows, dropout, over grouped_mm", step, "ours", "grouped", 1.0)
    for row in rows_of(document["cases"], mode=STEP, group="target"):
        memory = row.get("memory", {})
        if "ours" not in memory or "one" not in memory:
            continue
        own, one = memory["ours"], memory["one"]
        bound = one["peak"] + own["factors"] - one["factors"]
        share = own["peak"] / bound
        verdict = "pass" if share <= 1.05 else "MISS"
        name = row["case"]["id"].removeprefix("step ")
        what = f"peak memory, {name}, over one adapter's step and the others' gradients"
        rows.append([what, "1.05x", f"{share:.2f}", verdict])
    return rows


def memory(rows: Sequence[Row]) -> str:
    """Peak bytes of steps."""
    rows = [row for row in rows if row.get("memory")]
    columns = [("peak of a step", lambda row: row["case"]["id"].removeprefix("step "))]
    columns += peak_columns(present(rows, LABELS, "memory"))
    return table_of(rows, columns)


def left_out(
    rows: Sequence[Row], labels: Mapping[str, str] = LABELS, right: str = "the loop"
) -> str:
    """One line for each reason why a variant or a case has no figure, or a wrong one."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, text in (row["notes"] | row.get("errors", {})).items():
            reasons[name, text] = reasons.get((name, text), 0) + 1
    lines = [f"- {labels[n]}: left out of {count} cases: {t}" for (n, t), count in reasons.items()]
    for row in rows:
        case = row["case"]["id"]
        for name, found in row.get("disagreements", {}).items():
            lines.append(f"- {case}: {labels[name]} DISAGREES with {right}: {'; '.join(found)}")
        if "error" in row:
            lines.append(f"- {case}: not measured: {row['error']}")
    return "\n".join(lines)


def text(document: Document, images: Sequence[str]) -> str:
    """The whole report."""
    mark = markdown.device_of(document)
    cases = document["cases"]
    complete = "" if document["complete"] else " (incomplete)"
    headings = {"target": "Sizes with a target", "rows": "Over rows", "adapters": "Over adapters"}
    bodies = [
        ("Targets", table(["target", "at most", "measured", "verdict"], targets(document), (0, 3)))
    ]
    bodies += [
        (f"{heading}: {mode}", times(rows_of(cases, group=group, mode=mode), mode))
        for group, heading in headings.items()
        for mode in (FORWARD, STEP)
    ]
    bodies += [("Peak memory", memory(cases)), ("Left out and wrong", left_out(cases))]
    return markdown.page(
        f"{mark} report: many adapters in one batch{complete}",
        markdown.machine_lines(document),
        *markdown.sections(bodies, mark),
        *markdown.pictures(images, mark),
        *markdown.sections([("Method", _METHOD)], mark),
    )
