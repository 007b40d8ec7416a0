"""What every report is made of: tables that are aligned for a terminal, sections, units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .results import Document, Ratio, Row, ratio

NOTHING = "-"

Column = tuple[str, Callable[[Row], str]]  # what stands above, and what a row has there


def page(title: str, *parts: str) -> str:
    """A document; empty parts are left out."""
    return "\n\n".join([f"# {title}", *(part for part in parts if part)]) + "\n"


def sections(bodies: Iterable[tuple[str, str]], mark: str = "") -> list[str]:
    """A part for each (heading, body); those without a body are left out.

    mark: put behind each heading, such as the kind of device
    """
    suffix = f" ({mark})" if mark else ""
    return [f"## {heading}{suffix}\n\n{body}" for heading, body in bodies if body]


def pictures(names: Iterable[str], mark: str) -> list[str]:
    """A part for each file beside the report."""
    return [f"![{Path(name).stem} ({mark})]({name})" for name in names]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table with padded columns, to the right except for the columns `left`; "" without rows."""
    if not rows:
        return ""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in columns]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def table_of(rows: Sequence[Row], columns: Sequence[Column], left: Sequence[int] = (0,)) -> str:
    """A table with one line for each row."""
    cells = [[text(row) for _, text in columns] for row in rows]
    return table([head for head, _ in columns], cells, left)


def milliseconds(ms: float) -> str:
    """A time with three significant digits, in us or ms."""
    value, unit = (ms * 1e3, "us") if ms < 1 else (ms, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def mebibytes(count: int) -> str:
    """Bytes in MiB, or in KiB where that would be nothing."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count / 2**10:.2f} KiB"


def quotient(found: Ratio | float | None, spread: bool = False) -> str:
    """A ratio with two digits and, with `spread`, its quartiles in brackets."""
    if found is None:
        return NOTHING
    if not isinstance(found, Ratio):
        return f"{found:.2f}"
    quartiles = f" ({found.p25:.2f}-{found.p75:.2f})" if spread else ""
    return f"{found.median:.2f}{quartiles}"


def floor_column(floor: str, key: str = "timing") -> Column:
    """The times of the variant that others are compared with."""
    return floor, lambda row: milliseconds(row[key][floor]["ms"])


def ratio_columns(
    labels: Mapping[str, str],
    floor: str,
    key: str = "timing",
    spread: Collection[str] | None = None,
) -> list[Column]:
    """The times of variants as multiples of the floor's.

    labels: variant -> what stands above
    key: which of results.TIMES
    spread: the variants of which quartiles are shown; by default all
    """
    return [
        (label, lambda row, n=n: quotient(ratio(row, n, floor, key), spread is None or n in spread))
        for n, label in labels.items()
    ]


def peak_columns(labels: Mapping[str, str]) -> list[Column]:
    """Peak bytes of variants, of those rows that have them."""

    def peak(row: Row, name: str) -> str:
        found = row["memory"].get(name)
        return mebibytes(found["peak"]) if found else NOTHING

    return [(label, lambda row, n=name: peak(row, n)) for name, label in labels.items()]


def present(rows: Iterable[Row], labels: Mapping[str, str], key: str = "timing") -> dict[str, str]:
    """The labels of the variants that any of the rows has."""
    found = {name for row in rows for name in row.get(key, {})}
    return {name: label for name, label in labels.items() if name in found}


def device_of(document: Document) -> str:
    """What titles are marked with: the kind of device."""
    return "GPU" if document["machine"]["device"] == "cuda" else "CPU"


def machine_lines(document: Document) -> str:
    """What a run was measured on, indented as code."""
    machine = document["machine"]
    build = machine["lora_ext"]
    lines = {
        "machine": machine["name"],
        "device": machine["gpu"] or machine["cpu"],
        "cores, threads used": f"{machine['cores']}, {machine['threads']}",
        "memory": f"{machine['memory_gib']} GiB",
        "system": machine["os"],
        "versions": ", ".join(f"{name} {text}" for name, text in machine["versions"].items()),
        "lora_ext": f"{build.get('version')}, CPU kernels: {build.get('cpu_isa')}",
        "torch's CPU kernels": machine["torch_cpu_capability"],
        "disturbance seen by": machine["disturbance_source"],
        "date": machine["date"],
    }
    if machine.get("commit"):
        lines["commit"] = machine["commit"]
    width = max(map(len, lines))
    return "\n".join(f"    {key.ljust(width)}  {value}" for key, value in lines.items())
