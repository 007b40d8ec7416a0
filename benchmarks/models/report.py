"""Tables and plot of a run over whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import machine_lines
from ..tables import mebibytes, milliseconds, table
from .step import VARIANTS

LABELS = {
    "frozen": "frozen",
    "ours": "ours",
    "ours_fp32": "ours, float32 adapters",
    "peft": "PEFT, bf16 adapters",
    "peft_default": "PEFT default",
}
# Time of a step over the frozen model's.
TIME_TARGETS = {"ours": 1.06, "ours_fp32": 1.15}
MEMORY_SLACK = 1.03
_COLORS = {"ours": "#c1272d", "ours_fp32": "#8c1d40", "peft": "#1f6fb4", "peft_default": "#7aa6cf"}

_METHOD = """\
- A step is forward and backward of the whole model on 2048 tokens. The embedded tokens want a
  gradient, so that gradients pass through all layers. r = 16; dropout 0.05 on the adapters, none in
  the model itself. frozen is the same step without adapters.
- The variants take turns in one process, in a new order each round, on rotating inputs. Ratios are
  medians over rounds of the quotient within a round, quartiles in brackets. A sample whose threads
  waited more than 3% of its time for a core is dropped and taken again.
- Memory is what torch's allocator holds at its peak above what was live before the step. The bound
  is 1.03 times the sum of the frozen model's peak and the distinct inputs of adapted layers which
  the frozen model does not save anyway: gradients of adapters cannot be had without them."""


def ratios(case: dict[str, Any], variant: str) -> list[float]:
    """The variant's time over the frozen model's, for each round in which both were clean."""
    over, under = (case["timing"][name]["samples"] for name in (variant, "frozen"))
    clean = sorted(a / b for a, b in zip(over, under, strict=True) if a and b)
    whole = case["timing"][variant]["ms"] / case["timing"]["frozen"]["ms"]
    return clean or [whole]


def ratio_text(case: dict[str, Any], variant: str) -> str:
    found = ratios(case, variant)
    quarter = len(found) // 4
    disturbed = " !" if case["timing"][variant]["disturbed"] else ""
    low, middle, high = found[quarter], found[len(found) // 2], found[-1 - quarter]
    return f"{middle:.2f} ({low:.2f}-{high:.2f}){disturbed}"


def memory_bound(case: dict[str, Any]) -> float:
    """The largest peak allowed, in bytes."""
    return MEMORY_SLACK * (case["peak"]["frozen"] + case["inputs_to_save"])


def text(document: dict[str, Any], images: list[str]) -> str:
    """The report as Markdown."""
    others = [name for name in VARIANTS if name != "frozen"]
    cases = document["cases"]
    times = [
        [c["id"], milliseconds(c["timing"]["frozen"]["ms"])]
        + [ratio_text(c, name) for name in others]
        for c in cases
    ]
    memory = [
        [c["id"], mebibytes(c["peak"]["frozen"]), f"{memory_bound(c) / c['peak']['frozen']:.2f}"]
        + [f"{c['peak'][name] / c['peak']['frozen']:.2f}" for name in others]
        for c in cases
    ]
    targets = [
        [c["id"], LABELS[name], what, f"{limit:.2f}", f"{value:.2f}", verdict(value, limit)]
        for c in cases
        for name in TIME_TARGETS
        for what, limit, value in (
            ("time", TIME_TARGETS[name], ratios(c, name)[len(ratios(c, name)) // 2]),
            (
                "peak memory",
                memory_bound(c) / c["peak"]["frozen"],
                c["peak"][name] / c["peak"]["frozen"],
            ),
        )
    ]
    labels = [LABELS[name] for name in others]
    parts = [
        "# CPU report: a training step of whole models",
        machine_lines(document),
        "## Time, as a multiple of frozen (CPU)",
        table(["model, layers, base", "frozen", *labels], times),
        "## Peak memory, as a multiple of frozen (CPU)",
        table(["model, layers, base", "frozen", "bound", *labels], memory),
        "## Targets (CPU)",
        table(["model, layers, base", "variant", "what", "limit", "value", "verdict"], targets),
        *(f"![{Path(name).stem} (CPU)]({name})" for name in images),
        "## Method (CPU)",
        _METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "missed"


def plot(document: dict[str, Any], folder: Path) -> list[str]:
    """Bars of time and memory over frozen; returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = document["cases"]
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.2 + 1.0 * len(cases)), sharey=True)
    values = [
        ("time of a step", lambda c, n: ratios(c, n)[len(ratios(c, n)) // 2]),
        ("peak memory of a step", lambda c, n: c["peak"][n] / c["peak"]["frozen"]),
    ]
    for axes, (title, value) in zip(panels, values, strict=True):
        for place, name in enumerate(_COLORS):
            lengths = [value(case, name) for case in cases]
            heights = [line + 0.2 * place for line in range(len(cases))]
            bars = axes.barh(heights, lengths, 0.18, color=_COLORS[name], label=LABELS[name])
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axvline(1.0, color="black", linewidth=1.2)
        axes.set_yticks([line + 0.3 for line in range(len(cases))], [c["id"] for c in cases])
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
        ncols=len(_COLORS),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    figure.savefig(folder / "models.png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return ["models.png"]
