"""The report's tables: rows of text from a document. Markdown that is aligned for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import Document, Result, in_order, is_disturbed, ratio
from .shapes import STEP
from .variants import LABELS, ROUTES, floor_of

NOTHING = "-"
_PEERS = ("peft", "peft_default", "naive", "loralib", "unsloth", "triton_pair", "compiled")
_OURS = ("ours", "ours_packed", "ours_fp32", *ROUTES)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table with padded columns, to the right except for the columns `left`."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    widths = [max(3, width) for width in widths]

    def line(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in columns]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def milliseconds(ms: float) -> str:
    """A time with three significant digits, in us or ms."""
    value, unit = (ms * 1e3, "us") if ms < 1 else (ms, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def mebibytes(count: int) -> str:
    """Bytes in MiB, or in KiB where that would be nothing."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count / 2**10:.2f} KiB"


def _ratio_text(
    result: Result, over: str, under: str, spread: bool = False, key: str = "timing"
) -> str:
    found = ratio(result, over, under, key)
    if found is None:
        return NOTHING
    quartiles = f" ({found.p25:.2f}-{found.p75:.2f})" if spread else ""
    return f"{found.median:.2f}{quartiles}"


def _present(results: Sequence[Result], names: Sequence[str], key: str = "timing") -> list[str]:
    return [name for name in names if any(name in r.get(key, {}) for r in results)]


def _name_of(result: Result) -> str:
    """The cell's name without its mode, which the heading says."""
    mark = " **WRONG**" if result["status"] == "wrong" else ""
    return result["cell"]["id"].replace(f" {result['cell']['mode']} ", " ", 1) + mark


def _of_mode(document: Document, mode: str, real: bool = False) -> list[Result]:
    return [
        r
        for r in in_order(document["cells"])
        if r["cell"]["mode"] == mode
        and r["status"] != "error"
        and r["cell"]["group"] != "call"
        and (r["cell"]["group"] == "real") == real
    ]


def latency(document: Document, mode: str, real: bool = False, key: str = "timing") -> str:
    """Each variant's time as a multiple of the floor's, and ours as a multiple of PEFT's.

    key: "timing" for calls, "graph" for replays of CUDA graphs
    """
    results = _of_mode(document, mode, real)
    floor = floor_of(mode)
    ours, peers = _present(results, _OURS, key), _present(results, _PEERS, key)
    header = ["cell", floor, *(LABELS[name] for name in ours)]
    header += [LABELS[name] for name in peers] + ["ours / PEFT", "n (dropped)"]
    rows = []
    for result in results:
        timing = result.get(key, {})
        if floor not in timing:
            continue
        row = [_name_of(result), milliseconds(timing[floor]["ms"])]
        row += [_ratio_text(result, name, floor, name == "ours", key) for name in ours]
        row += [_ratio_text(result, name, floor, key=key) for name in peers]
        row.append(_ratio_text(result, "ours", "peft", key=key))
        dropped = sum(t["dropped"] for t in timing.values())
        disturbed = "!" if is_disturbed(result) else ""
        row.append(f"{min(t['n'] for t in timing.values())} ({dropped}){disturbed}")
        rows.append(row)
    return table(header, rows)


def call_overhead(document: Document) -> str:
    """Time of a call on 2x8, in us, and ours as a multiple of PEFT's."""
    results = [r for r in document["cells"] if r["cell"]["group"] == "call" and r.get("timing")]
    names = _present(results, ("merged", "frozen", "ours", "ours_packed", *_PEERS))
    rows = []
    for result in results:
        timing = result["timing"]
        row = [result["cell"]["mode"]]
        row += [f"{timing[n]['ms'] * 1e3:.1f}" if n in timing else NOTHING for n in names]
        rows.append([*row, _ratio_text(result, "ours", "peft", spread=True)])
    return table(["us per call", *(LABELS[n] for n in names), "ours / PEFT"], rows)


def memory(document: Document, mode: str) -> str:
    """Peak bytes above what was live before, as a multiple of the floor's, and saved bytes."""
    floor = floor_of(mode)
    results = [r for r in in_order(document["cells"]) if r["cell"]["mode"] == mode]
    results = [r for r in results if floor in r.get("memory", {}) and r["cell"]["group"] != "call"]
    names = [n for n in _present(results, (*_OURS, *_PEERS), "memory") if n != "compiled"]
    saved = [n for n in ("ours", "peft", "peft_default") if n in names] if mode == STEP else []
    header = ["cell", f"{floor} peak", *(LABELS[n] for n in names)]
    header += [f"saved: {LABELS[n]}" for n in saved]
    rows = []
    for result in results:
        found = result["memory"]
        base = found[floor]["peak"]
        row = [_name_of(result), mebibytes(base)]
        row += [f"{found[n]['peak'] / base:.2f}" if n in found and base else NOTHING for n in names]
        row += [mebibytes(found[n]["saved"]) if n in found else NOTHING for n in saved]
        rows.append(row)
    return table(header, rows)


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


def stages(results: dict[str, dict[str, Any]]) -> str:
    """What each stage of a GPU run said."""
    rows = [
        [name, result["status"], f"{result['seconds']:.0f} s", result["summary"].replace("|", "/")]
        for name, result in results.items()
    ]
    return table(["stage", "status", "took", "summary"], rows, left=(0, 1, 3))


def predictions(entries: Sequence[dict[str, Any]]) -> str:
    """The model's times beside the measured ones, the worst first."""

    def off(entry: dict[str, Any]) -> float:
        return entry["measured_us"] / entry["predicted_us"]

    rows = [
        [
            entry["cell"],
            LABELS.get(entry["variant"], entry["variant"]),
            milliseconds(entry["predicted_us"] / 1e3),
            milliseconds(entry["measured_us"] / 1e3),
            f"{off(entry):.2f}",
            entry["longest"],
        ]
        for entry in sorted(entries, key=off, reverse=True)
    ]
    header = ["cell", "variant", "predicted", "measured", "measured / predicted", "longest launch"]
    return table(header, rows, left=(0, 1, 5))


def profiles(results: dict[str, dict[str, Any]]) -> str:
    """The kernels of the calls that are furthest from their predictions, and what ncu counted."""
    found = results.get("profile", {})
    rows = []
    for one in found.get("profiles", []):
        call = f"{LABELS[one['variant']]}, {one['cell']}"
        predicted = ", ".join(f"{name} {us:.1f}" for name, us in one["predicted"])
        least = sorted((us for _, us in one["kernels"]), reverse=True)[:_LISTED][-1:]
        longest = [(kernel, us) for kernel, us in one["kernels"] if us >= least[0]]
        for number, (kernel, us) in enumerate(longest):
            first = number == 0
            rows.append([call if first else "", kernel[:60], f"{us:.1f}", predicted * first])
    header = ["call", "kernel", "us", "launches predicted, us"]
    listed = table(header, rows, left=(0, 1, 3))
    counted = [
        [entry["kernel"][:60], *(f"{entry[n]:.4g}" if n in entry else NOTHING for n in _COUNTED)]
        for entry in found.get("counters", [])
    ]
    return "\n\n".join(part for part in (listed, table(["ncu", *_COUNTED], counted)) if part)


_LISTED = 14  # kernels of a call, the longest of them
_COUNTED = ("us", "DRAM bytes read", "DRAM bytes written", "tensor pipes busy, %")


def clocks(document: Document) -> str:
    """What the card said before and after the first, the middle and the last cell."""
    read = [r for r in document["cells"] if (r.get("card") or {}).get("after")]
    rows = []
    for result in dict.fromkeys((0, len(read) // 2, len(read) - 1)) if read else ():
        card = read[result]["card"]
        for when in ("before", "after"):
            values = card[when] or {}
            rows.append([read[result]["cell"]["id"], when, *map(str, values.values())])
    names = list((read[0]["card"]["after"]) if read else ())
    return table(["cell", "read", *names], rows, left=(0, 1))
