"""What is said of a run over cells, on any device: times, memory, targets, errors, failures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from . import markdown
from .markdown import (
    NOTHING,
    Column,
    floor_column,
    mebibytes,
    present,
    quotient,
    ratio_columns,
    table,
    table_of,
)
from .results import Document, Row, is_disturbed, least_ratio, peak_ratio, ratio
from .shapes import BACKWARD, FORWARD, STEP, reading_order
from .variants import LABELS, ROUTES, floor_of

_METHOD = """\
- The variants of a cell take turns in one process, in a new order each round; all use the same
  threads. Inputs and upstream gradients rotate through several copies. An untimed call precedes
  each batch, so that a variant finds caches and allocator as it leaves them itself.
- A sample during which our own threads waited more than 3% of the time for a core is dropped and
  taken again; "n (dropped)" counts the samples of the variant with the fewest and all that were
  dropped in the cell. "!" marks a cell in which too few were clean: it stands for nothing, and no
  target is read from it.
- Ratios are medians over the rounds of the quotient within a round, with quartiles in brackets.
- forward runs under no_grad, in training mode, so that dropout is on where a cell has it. step is
  forward and backward with a random upstream gradient; x and the adapters get gradients.
- merged is nn.Linear with the adapter merged in; frozen is the base nn.Linear, forward and gradient
  of x; merged, packed is the merged layer in oneDNN's layout. Before the timing each of ours,
  without dropout, is compared with naive.
- ours fp32 and PEFT default have float32 adapters on a half base, which is what PEFT does unless
  told otherwise; the others have adapters in the dtype of the base.
- backward is that of an output made before. On a GPU, L2 is overwritten before each call; a graph
  replay is one call captured in a CUDA graph, in turn with the others.
- Memory is what torch's allocator holds at its peak above what was live before the call. Scratch
  memory that a library takes elsewhere is not seen. Saved bytes leave out weights and adapters.\
"""

_LATENCIES = {
    "Forward, as a multiple of merged": FORWARD,
    "Backward, as a multiple of frozen": BACKWARD,
    "Training step, as a multiple of frozen": STEP,
}

_PEERS = ("peft", "peft_default", "naive", "loralib", "unsloth", "compiled")
_OURS = ("ours", "ours_packed", "ours_fp32", *ROUTES)
# Beside the floor that ratios refer to.
_COLUMNS = {name: LABELS[name] for name in ("merged_packed", *_OURS, *_PEERS)}


def _name_of(result: Row) -> str:
    """The cell's name without its mode, which the heading says."""
    mark = " **WRONG**" if result["status"] == "wrong" else ""
    return result["cell"]["id"].replace(f" {result['cell']['mode']} ", " ", 1) + mark


def _of_mode(document: Document, mode: str, real: bool | None = None) -> list[Row]:
    """In the order of reading; real: only layers of a real model, or only others."""
    return [
        r
        for r in sorted(document["cells"], key=reading_order)
        if r["cell"]["mode"] == mode
        and r["status"] != "error"
        and r["cell"]["group"] != "call"
        and real in (None, r["cell"]["group"] == "real")
    ]


def latency(document: Document, mode: str, real: bool = False, key: str = "timing") -> str:
    """Each variant's time as a multiple of the floor's, and ours as a multiple of PEFT's.

    key: "timing" for calls, "graph" for replays of CUDA graphs
    """
    floor = floor_of(mode)
    cells = _of_mode(document, mode, real)

    def dropped(cell: Row) -> str:
        timing = cell[key].values()
        disturbed = "!" if is_disturbed(cell) else ""
        return f"{min(t['n'] for t in timing)} ({sum(t['dropped'] for t in timing)}){disturbed}"

    columns: list[Column] = [("cell", _name_of)]
    columns += [floor_column(floor, key)]
    columns += ratio_columns(present(cells, _COLUMNS, key), floor, key, ("ours",))
    columns.append(("ours / PEFT", lambda cell: quotient(ratio(cell, "ours", "peft", key))))
    if document["kind"] == "many-rows":
        columns.append(("ours, least", lambda cell: quotient(least_ratio(cell, "ours", floor))))
    columns.append(("n (dropped)", dropped))
    return table_of([cell for cell in cells if floor in cell.get(key, {})], columns)


def call_overhead(document: Document) -> str:
    """Time of a call on 2x8, in us, and ours as a multiple of PEFT's."""

    def us(cell: Row, name: str) -> str:
        return f"{cell['timing'][name]['ms'] * 1e3:.1f}" if name in cell["timing"] else NOTHING

    cells = [r for r in document["cells"] if r["cell"]["group"] == "call" and r.get("timing")]
    names = ("merged", "frozen", "ours", "ours_packed", *_PEERS)
    labels = present(cells, {name: LABELS[name] for name in names})
    columns: list[Column] = [("us per call", lambda cell: cell["cell"]["mode"])]
    columns += [(label, partial(us, name=name)) for name, label in labels.items()]
    columns.append(("ours / PEFT", lambda cell: quotient(ratio(cell, "ours", "peft"), True)))
    return table_of(cells, columns)


def memory(document: Document, mode: str) -> str:
    """Peak bytes above what was live before, as a multiple of the floor's, and saved bytes."""

    def saved(cell: Row, name: str) -> str:
        found = cell["memory"].get(name)
        return mebibytes(found["saved"]) if found else NOTHING

    floor = floor_of(mode)
    cells = [r for r in _of_mode(document, mode) if floor in r.get("memory", {})]
    labels = present(cells, {n: LABELS[n] for n in (*_OURS, *_PEERS) if n != "compiled"}, "memory")
    columns: list[Column] = [("cell", _name_of)]
    columns.append((f"{floor} peak", lambda cell: mebibytes(cell["memory"][floor]["peak"])))
    columns += [
        (label, lambda cell, n=n: quotient(peak_ratio(cell, n, floor)))
        for n, label in labels.items()
    ]
    if mode == STEP:
        shown = [n for n in ("ours", "peft", "peft_default") if n in labels]
        columns += [(f"saved: {LABELS[name]}", partial(saved, name=name)) for name in shown]
    return table_of(cells, columns)


def targets(rows: Sequence[dict[str, Any]]) -> str:
    """Target, limit, measured, verdict."""
    shown = []
    for row in rows:
        value, unit = row["measured"], row["unit"]
        if value is None:
            measured = NOTHING
        else:
            measured = f"{value:.3f}{unit}"
            if row["p25"] != row["p75"]:
                measured += f" ({row['p25']:.3f}-{row['p75']:.3f})"
        verdict = row["verdict"].upper() if row["verdict"] == "miss" else row["verdict"]
        limit = f"{row['limit']:g}{unit}"
        shown.append([f"{row['name']}: {row['where']}", limit, measured, verdict, row["note"]])
    return table(["target", "at most", "measured (quartiles)", "verdict", "note"], shown, (0, 3, 4))


def numerics(entries: Sequence[dict[str, Any]]) -> str:
    """Errors against float64: one line for each layer, dtype and tensor, rms and max of each."""
    names = list(dict.fromkeys(e["variant"] for e in entries))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in entries:
        if "tensor" in entry:
            key = (entry["layer"], entry["dtype"], entry["tensor"])
            values = [entry["rms"], entry["max"]]
            texts = ["not finite" if v is None else f"{v:.1e}" for v in values]
            lines.setdefault(key, {})[entry["variant"]] = " / ".join(texts)
    rows = [[" ".join(key), *(line.get(n, NOTHING) for n in names)] for key, line in lines.items()]
    return table(["rms / max error", *(LABELS[n] for n in names)], rows)


def failures(document: Document) -> list[str]:
    """One sentence for each cell or variant that failed, disagreed or was not begun."""
    found = []
    for result in document["cells"]:
        name = result["cell"]["id"]
        if "error" in result:
            found.append(f"{name}: not measured: {result['error']}")
        for variant, texts in result.get("disagreements", {}).items():
            found.append(f"{name}: {LABELS[variant]} DISAGREES with naive: {'; '.join(texts)}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in document["cells"]:
        for variant, text in result.get("errors", {}).items():
            reasons.setdefault((variant, text), []).append(result["cell"]["id"])
    for (variant, text), cells in reasons.items():
        where = cells[0] if len(cells) == 1 else f"{len(cells)} cells"
        found.append(f"{LABELS[variant]}: left out of {where}: {text}")
    found += [f"{name}: not begun within the time" for name in document["skipped"]]
    return found


def measured(document: Document) -> list[tuple[str, str]]:
    """(heading, body) of what was measured, in order; some bodies are empty."""
    return [
        ("Targets", targets(document["targets"])),
        *(
            (f"{heading}, graph replays", latency(document, mode, key="graph"))
            for heading, mode in _LATENCIES.items()
        ),
        *((heading, latency(document, mode)) for heading, mode in _LATENCIES.items()),
        ("A call on tiny tensors", call_overhead(document)),
        ("MiniLM on English sentences, forward", latency(document, FORWARD, real=True)),
        ("MiniLM on English sentences, step", latency(document, STEP, real=True)),
        ("MiniLM, errors against float64", numerics(document.get("numerics", []))),
        ("Peak memory of a step, as a multiple of frozen", memory(document, STEP)),
        ("Peak memory of a forward, as a multiple of merged", memory(document, FORWARD)),
    ]


def text(
    document: Document,
    images: Sequence[str],
    before: Sequence[tuple[str, str]] = (),
    after: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole report; (heading, body) pairs before and after what was measured."""
    mark = markdown.device_of(document)
    complete = "" if document["complete"] else " (incomplete)"
    failed = "\n".join(f"- {text}" for text in failures(document))
    bodies = [*before, *measured(document), *after, ("Left out and failed", failed)]
    return markdown.page(
        f"{mark} report: LoRA linear, {document['kind']} run{complete}",
        markdown.machine_lines(document),
        *markdown.sections(bodies, mark),
        *markdown.pictures(images, mark),
        *markdown.sections([("Method", _METHOD)], mark),
    )
