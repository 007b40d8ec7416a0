"""The Markdown report of a run; `python -m benchmarks.report FILE` renders a JSON file again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import results, tables
from .results import Document
from .shapes import BACKWARD, FORWARD, STEP

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
  of x. Before the timing each of ours, without dropout, is compared with naive.
- ours fp32 and PEFT default have float32 adapters on a half base, which is what PEFT does unless
  told otherwise; the others have adapters in the dtype of the base.
- backward is that of an output made before. On a GPU, L2 is overwritten before each call; a graph
  replay is one call captured in a CUDA graph, in turn with the others. Triton pair is the structure
  of LoRAFusion in our own writing.
- Memory is what torch's allocator holds at its peak above what was live before the call. Scratch
  memory that a library takes elsewhere is not seen. Saved bytes leave out weights and adapters.\
"""


_LATENCIES = {
    "Forward, as a multiple of merged": FORWARD,
    "Backward, as a multiple of frozen": BACKWARD,
    "Training step, as a multiple of frozen": STEP,
}


def place(document: Document) -> str:
    """What every title is marked with: the kind of device."""
    return "GPU" if document["machine"]["device"] == "cuda" else "CPU"


def machine_lines(document: Document) -> str:
    """What a run was measured on, indented as code."""
    machine: dict[str, Any] = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    build = machine["lora_ext"]
    rows = [
        ["machine", machine["name"]],
        ["device", machine["gpu"] or machine["cpu"]],
        ["cores, threads used", f"{machine['cores']}, {machine['threads']}"],
        ["memory", f"{machine['memory_gib']} GiB"],
        ["system", machine["os"]],
        ["versions", versions],
        ["lora_ext", f"{build.get('version')}, CPU kernels: {build.get('cpu_isa')}"],
        ["torch's CPU kernels", machine["torch_cpu_capability"]],
        ["disturbance seen by", machine["disturbance_source"]],
        ["date", machine["date"]],
    ]
    if machine.get("commit"):
        rows.append(["commit", machine["commit"]])
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"    {key.ljust(width)}  {value}" for key, value in rows)


def _sections(document: Document) -> list[tuple[str, str]]:
    """(heading, body) in order; sections without a body are left out."""
    failed = "\n".join(f"- {text}" for text in tables.failures(document))
    return [
        ("Stages", tables.stages(document.get("stages", {}))),
        ("Predicted and measured", tables.predictions(document.get("predictions", []))),
        ("Targets", tables.targets(document["targets"])),
        *(
            (f"{heading}, graph replays", tables.latency(document, mode, key="graph"))
            for heading, mode in _LATENCIES.items()
        ),
        *((heading, tables.latency(document, mode)) for heading, mode in _LATENCIES.items()),
        ("A call on tiny tensors", tables.call_overhead(document)),
        ("MiniLM on English sentences, forward", tables.latency(document, FORWARD, real=True)),
        ("MiniLM on English sentences, step", tables.latency(document, STEP, real=True)),
        ("MiniLM, errors against float64", tables.numerics(document.get("numerics", []))),
        ("Peak memory of a step, as a multiple of frozen", tables.memory(document, STEP)),
        ("Peak memory of a forward, as a multiple of merged", tables.memory(document, FORWARD)),
        ("Furthest from their predictions", tables.profiles(document.get("stages", {}))),
        ("Clocks and power", tables.clocks(document)),
        ("Left out and failed", failed),
    ]


def text(document: Document, images: list[str] | None = None) -> str:
    """The whole report as Markdown.

    images: file names of plots, relative to the report
    """
    mark = place(document)
    complete = "" if document["complete"] else " (incomplete)"
    parts = [
        f"# {mark} report: LoRA linear, {document['kind']} run{complete}",
        machine_lines(document),
        *(f"## {heading} ({mark})\n\n{body}" for heading, body in _sections(document) if body),
        *(f"![{Path(name).stem} ({mark})]({name})" for name in images or []),
        f"## Method ({mark})\n\n{_METHOD}",
    ]
    return "\n\n".join(parts) + "\n"


def _pictures(document: Document, folder: Path) -> list[str]:
    if document["kind"] == "gpu":
        from .gpu import plots as gpu_plots

        return gpu_plots.draw(document, folder)
    from . import plots

    return plots.draw(document, folder, place(document))


def write(document: Document, json_path: Path, with_plots: bool = True) -> Path:
    """Write report.md and the plots beside the JSON file; returns the report's path."""
    images: list[str] = []
    if with_plots:
        try:
            images = _pictures(document, json_path.parent)
        except Exception as error:  # the figures themselves must not be lost to a picture
            print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
    path = json_path.with_name("report.md")
    path.write_text(text(document, images))
    return path


def main(arguments: list[str]) -> int:
    """Render FILE again, targets included."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.report FILE", file=sys.stderr)
        return 2
    json_path = Path(arguments[0])
    try:
        document = results.read(json_path)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(write(document, json_path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
