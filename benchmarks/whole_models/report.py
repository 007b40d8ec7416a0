"""Tables and plot of a run over whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import machine_lines
from ..tables import mebibytes, milliseconds, table
from .overhead import overheads
from .step import VARIANTS

LABELS = {
    "frozen": "frozen",
    "ours": "ours",
    "ours_fp32": "ours, float32 adapters",
    "peft": "PEFT, bf16 adapters",
    "peft_default": "PEFT default",
    "peft_accelerated": "PEFT, bf16 adapters, accelerated",
    "peft_default_accelerated": "PEFT default, accelerated",
}
# Time of a step over the frozen model's.
TIME_TARGETS = {
    "ours": 1.06,
    "ours_fp32": 1.15,
    "peft_accelerated": 1.06,
    "peft_default_accelerated": 1.15,
}
# How many times faster a step is after lora_ext.accelerate, at least.
SPEEDUP_TARGET = 1.5
# Python and dispatch of an accelerated layer's call over those of PEFT's.
OVERHEAD_TARGET = 0.5
MEMORY_SLACK = 1.03
_COLORS = {
    "ours": "#c1272d",
    "ours_fp32": "#8c1d40",
    "peft_accelerated": "#e08214",
    "peft_default_accelerated": "#b35806",
    "peft": "#1f6fb4",
    "peft_default": "#7aa6cf",
}

_METHOD = """\
- A step is forward and backward of the whole model on 2048 tokens. The embedded tokens want a
  gradient, so that gradients pass through all layers. r = 16; dropout 0.05 on the adapters, none in
  the model itself. frozen is the same step without adapters. A forward is one without gradients, in
  eval mode. Accelerated is the same PEFT model after `lora_ext.accelerate`, all layers on the op.
- The variants take turns in one process, in a new order each round, on rotating inputs. Ratios are
  medians over rounds of the quotient within a round, quartiles in brackets. A sample whose threads
  waited more than 3% of its time for a core is dropped and taken again.
- Memory is what torch's allocator holds at its peak above what was live before the step. The bound
  is 1.03 times the sum of the frozen model's peak and the distinct inputs of adapted layers which
  the frozen model does not save anyway: gradients of adapters cannot be had without them.
- The overhead of a layer is a call on 2 x 8 numbers, less the ops that it makes, timed alone."""


def ratios(
    case: dict[str, Any], variant: str, below: str = "frozen", what: str = "timing"
) -> list[float]:
    """The variant's time over another's, for each round in which both were clean.

    Args:
        what: "timing", a step, or "forward".
    """
    over, under = (case[what][name]["samples"] for name in (variant, below))
    clean = sorted(a / b for a, b in zip(over, under, strict=True) if a and b)
    whole = case[what][variant]["ms"] / case[what][below]["ms"]
    return clean or [whole]


def median(values: list[float]) -> float:
    return values[len(values) // 2]


def ratio_text(case: dict[str, Any], variant: str, what: str = "timing") -> str:
    found = ratios(case, variant, what=what)
    quarter = len(found) // 4
    disturbed = " !" if case[what][variant]["disturbed"] else ""
    low, middle, high = found[quarter], found[len(found) // 2], found[-1 - quarter]
    return f"{middle:.2f} ({low:.2f}-{high:.2f}){disturbed}"


def memory_bound(case: dict[str, Any]) -> float:
    """The largest peak allowed, in bytes."""
    return MEMORY_SLACK * (case["peak"]["frozen"] + case["inputs_to_save"])


def text(document: dict[str, Any], images: list[str]) -> str:
    """The report as Markdown."""
    others = [name for name in VARIANTS if name != "frozen"]
    cases = document["cases"]
    labels = [LABELS[name] for name in others]
    heads = ["model, layers, base", "frozen"]
    tables = {
        what: [
            [c["id"], milliseconds(c[what]["frozen"]["ms"])]
            + [ratio_text(c, name, what) for name in others]
            for c in cases
        ]
        for what in ("timing", "forward")
    }
    memory = [
        [c["id"], mebibytes(c["peak"]["frozen"]), f"{memory_bound(c) / c['peak']['frozen']:.2f}"]
        + [f"{c['peak'][name] / c['peak']['frozen']:.2f}" for name in others]
        for c in cases
    ]
    forward_memory = [
        [c["id"], mebibytes(c["forward_peak"]["frozen"])]
        + [f"{c['forward_peak'][name] / c['forward_peak']['frozen']:.2f}" for name in others]
        for c in cases
    ]
    columns = ["model, layers, base", "variant", "what", "limit", "value", "verdict"]
    parts = [
        "# CPU report: a training step of whole models",
        machine_lines(document),
        "## Time of a step, as a multiple of frozen (CPU)",
        table([*heads, *labels], tables["timing"]),
        "## Peak memory of a step, as a multiple of frozen (CPU)",
        table([*heads, "bound", *labels], memory),
        "## Time of a forward, as a multiple of frozen (CPU)",
        table([*heads, *labels], tables["forward"]),
        "## Peak memory of a forward, as a multiple of frozen (CPU)",
        table([*heads, *labels], forward_memory),
        "## Targets (CPU)",
        table(columns, [row for case in cases for row in target_rows(case)]),
        *overhead_part(document.get("overhead", {})),
        *(f"![{Path(name).stem} (CPU)]({name})" for name in images),
        "## Method (CPU)",
        _METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def target_rows(case: dict[str, Any]) -> list[list[str]]:
    """Limits of time and memory, and how many times faster accelerate makes PEFT's step."""
    rows = []
    for name, limit in TIME_TARGETS.items():
        value = median(ratios(case, name))
        rows.append([LABELS[name], "time", f"{limit:.2f}", f"{value:.2f}", verdict(value, limit)])
        limit, value = (
            size / case["peak"]["frozen"] for size in (memory_bound(case), case["peak"][name])
        )
        measures = ["peak memory", f"{limit:.2f}", f"{value:.2f}", verdict(value, limit)]
        rows.append([LABELS[name], *measures])
    for name in ("peft", "peft_default"):
        value = median(ratios(case, name, f"{name}_accelerated"))
        met = "met" if value >= SPEEDUP_TARGET else "missed"
        what = "its time over the accelerated"
        rows.append([LABELS[name], what, f"{SPEEDUP_TARGET:.2f}", f"{value:.2f}", met])
    return [[case["id"], *row] for row in rows]


def overhead_part(overhead: dict[str, Any]) -> list[str]:
    """A heading and a table of what a layer's call costs beside its ops."""
    if not overhead:
        return []
    rows = []
    for dropout, times in overhead.items():
        theirs, ours = overheads(times)
        us = [f"{1000 * times[name]['ms']:.1f}" for name in times]
        value = ours / theirs
        verdict_text = verdict(value, OVERHEAD_TARGET)
        rows.append([dropout, *us, f"{theirs:.1f}", f"{ours:.1f}", f"{value:.2f}", verdict_text])
    names = list(next(iter(overhead.values())))
    heads = ["dropout", *names, "PEFT's overhead", "ours", "ratio", f"at most {OVERHEAD_TARGET}"]
    return ["## Overhead of a layer's call, microseconds (CPU)", table(heads, rows)]


def verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "missed"


def plot(document: dict[str, Any], folder: Path) -> list[str]:
    """Bars of time and memory over frozen; returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = document["cases"]
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.2 + 1.3 * len(cases)), sharey=True)
    values = [
        ("time of a step", lambda c, n: median(ratios(c, n))),
        ("peak memory of a step", lambda c, n: c["peak"][n] / c["peak"]["frozen"]),
    ]
    for axes, (title, value) in zip(panels, values, strict=True):
        for place, name in enumerate(_COLORS):
            lengths = [value(case, name) for case in cases]
            heights = [line + 0.14 * place for line in range(len(cases))]
            bars = axes.barh(heights, lengths, 0.13, color=_COLORS[name], label=LABELS[name])
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axvline(1.0, color="black", linewidth=1.2)
        axes.set_yticks([line + 0.35 for line in range(len(cases))], [c["id"] for c in cases])
        axes.set_title(f"CPU: {title}", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("x frozen model (less is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        ncols=len(_COLORS) // 2,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    figure.savefig(folder / "models.png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return ["models.png"]
