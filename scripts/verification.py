"""Writes docs/verification.md: every claim with a figure, and how it is known.

    python scripts/verification.py [--check]

From the result files under benchmarks/results/, docs/emulation.md and the golden vectors, so that
the page cannot say what no file shows. --check only compares: exit status 1 if it is stale.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.gpu import gpu_targets  # noqa: E402
from benchmarks.markdown import quotient  # noqa: E402
from scripts.nightly import SLICES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "verification.md"
GOLDEN = ROOT / "emulator" / "conformance" / "golden"

HEAD = """# What is claimed, and how it is known

Written by `python scripts/verification.py` from the result files; a test compares. Three words:

- **measured**: timed or counted on the named machine, on the named day, with the command beside it;
- **emulator-verified**: kernels run by the execution layer on a CPU ([emulation.md](emulation.md));
- **compiled**: seen in what nvcc and ptxas made of the source.

What the planner predicts of a GPU ([predictions.md](predictions.md)) is no claim:
`make gpu` puts it beside what it measures.

A layer has K inputs and N outputs, a call M rows (tokens), an adapter the rank r. *frozen*: the
layer or model without adapters; *merged*: with the adapter added to its weight; *ours*:
`lora_linear`. *The grid*: all layers of a run with K=N=1024 or 4096 and 1, 16, 512 or 2048 rows.
"""


def read(*parts: str) -> dict:
    return results.read(RESULTS.joinpath(*parts) / "results.json")


def place(machine: dict) -> str:
    return f"{machine['name']}, {machine['date'][:10]}, torch {machine['versions']['torch']}"


def section(title: str, machine: dict, command: str, body: str) -> str:
    return f"## {title}\n\nMeasured: {place(machine)}; `make {command}`.\n\n{body}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu_targets() -> str:
    document = read("xeon-amx-2-cores", "headline")
    rows, met = [], 0
    for target in document["targets"]:
        if target["verdict"] == "pass":
            met += 1
            continue
        measured = target["measured"]
        value = "-" if measured is None else f"{measured:.2f}{target['unit']}"
        limit = f"{target['limit']:g}{target['unit']}"
        rows.append([target["name"], target["where"], limit, value, target["verdict"]])
    body = table(["claim", "where", "at most", "measured", "verdict"], rows)
    told = f"{met} of {len(document['targets'])} targets are met. The others:\n\n{body}"
    return section("One layer on the CPU", document["machine"], "bench", told)


# Machine, run, what its models are, the part of its results, the end of its rows' names.
RUNS = [
    ("xeon-amx-2-cores", "models", "steps of bfloat16 models", "cases", ""),
    ("xeon-avx512-2-cores", "whole_models", "steps of bfloat16 models", "cases", ""),
    ("xeon-avx512-2-cores", "models_135m", "step of a Llama of 135M's shape", "cases", ""),
    ("xeon-avx512-2-cores", "nf4", "steps of NF4 models", "cases", ""),
    ("epyc-avx512-2-cores", "quantized_and_packed", "steps of NF4 models", "cases", ""),
    ("xeon-avx512-2-cores", "int8", "steps of int8 models", "cases", ""),
    ("xeon-amx-2-cores", "int8", "steps of int8 models", "cases", ""),
    ("xeon-amx-2-cores", "experts", "experts, 1 token", "experts", ", 1 token"),
    ("xeon-amx-2-cores", "experts", "experts, a forward", "experts", "forward, 1024 tokens"),
    ("xeon-amx-2-cores", "experts", "experts, a step", "experts", "step, 1024 tokens"),
    ("xeon-avx512-2-cores", "experts", "experts, 1 token", "experts", ", 1 token"),
    ("xeon-avx512-2-cores", "experts", "experts, a forward", "experts", "forward, 1024 tokens"),
    ("xeon-avx512-2-cores", "experts", "experts, a step", "experts", "step, 1024 tokens"),
]
VARIANTS = {
    "peft": "PEFT bf16",
    "peft_accelerated": "accelerated",
    "peft_default": "PEFT default",
    "peft_default_accelerated": "accelerated",
}


def span(cases: list[dict], variant: str) -> str:
    """The least and the most of a variant's times over frozen."""
    found = [quotient(results.ratio(case, variant, "frozen")) for case in cases]
    return " to ".join(sorted({min(found, key=float), max(found, key=float)}, key=float))


def models() -> str:
    rows = []
    for machine, name, what, part, end in RUNS:
        document = read(machine, name)
        cases = [case for case in document[part] if case["id"].endswith(end)]
        link = f"[{what}](../benchmarks/results/{machine}/{name}/report.md)"
        where = f"{machine}, {document['machine']['date'][:10]}"
        rows.append([link, where, *(span(cases, variant) for variant in VARIANTS)])
    body = table(["time over the frozen model's", "measured on", *VARIANTS.values()], rows)
    intro = (
        "Measured by `make bench-models`, torch 2.13; from the least to the most of a run's models."
    )
    return f"## Whole models on the CPU\n\n{intro}\n\n{body}"


def fine_tuning() -> str:
    document = read("xeon-amx-2-cores", "runs")
    variants = ("peft_default", "peft_default_accelerated")
    rows = [
        [
            run["id"],
            *(f"{1000 * run['tokens'] / run['timing'][each]['ms']:.0f}" for each in variants),
        ]
        for run in document["runs"]
    ]
    body = table(["tokens a second", "PEFT default", "accelerated"], rows)
    return section("Fine-tuning on the CPU", document["machine"], "bench-models", body)


def gpu_runs() -> list[tuple[Path, dict]]:
    """(file, document) of each run of `make gpu` on a GPU."""
    found = [(path, results.read(path)) for path in sorted(RESULTS.rglob("results.json"))]
    return [
        (path, document)
        for path, document in found
        if document["kind"] == "gpu" and document["machine"]["device"] == "cuda"
    ]


def many_on_a_gpu() -> list[list[str]]:
    """What a forward of many adapters is to take, and does on each card."""
    claim = f"many adapters in one batch: at most {gpu_targets.LIMIT} x merged, {gpu_targets.WHERE}"
    measured = [
        (document["machine"]["name"], target)
        for _, document in gpu_runs()
        for target in document["targets"]
        if target["where"] == gpu_targets.WHERE and target["measured"] is not None
    ]
    if not measured:
        return [[claim, "not measured yet", "`make gpu`"]]
    return [
        [claim, f"measured: {target['measured']:.3f}x, {target['verdict']}", f"`make gpu`, {name}"]
        for name, target in measured
    ]


def kernels() -> str:
    vectors = sorted(path.name for path in GOLDEN.iterdir() if path.suffix == ".json")
    cards = ", ".join(vectors) if vectors else "none: no GPU has run them"
    listed = [
        ["forward, backward and gradients equal float64 within bounds, integers exactly",
         "emulator-verified", "`make test-kernels`"],
        ["every mutant of the kernels is caught, but those that change no result",
         "emulator-verified", "[how](emulation.md#who-catches-what)"],
        ["the op's own tests pass on the kernels: two routes for 8.0, and Hopper's",
         "emulator-verified", "`tests/emulated/test_package.py`"],
        ["CUDA calls of `kernels/launch/` are what the plan says and CUDA allows; failing ones are"
         " seen",
         "emulator-verified", "`tests/emulated/test_cuda_launches.py`"],
        ["no spill, local memory, serialised product, or barrier in a main loop, for sm_80 and"
         " sm_90a", "compiled", "`make sass`"],
        [f"golden vectors of the PTX functions: {cards}", "not shown", "`make gpu`"],
        ["any time on a GPU", "not shown", "`make gpu`"],
        *many_on_a_gpu(),
    ]  # fmt: skip
    return "## CUDA kernels\n\n" + table(["claim", "how it is known", "by"], listed)


def peft() -> str:
    suite = (ROOT / "docs" / "compatibility-suite.md").read_text()
    found = re.search(
        r"^\*\*(\d+) of (\d+) cases pass.*?; of those .* (\d+) of (\d+)\.$", suite, re.M
    )
    assert found is not None
    where = re.search(r"^PEFT .*CPU", suite, re.MULTILINE)
    assert where is not None
    anew = re.search(
        r"Of its cases (\d+) pass as they are.*?\*\*(\d+) pass accelerated", suite, re.S
    )
    cases, forwards = f"{found[1]} of {found[2]}", f"{found[3]} of {found[4]}"
    rows = [
        [f"PEFT's own LoRA tests pass accelerated{', before experts were' if anew else ''}", cases],
        ["those of them in which a fast path computes a forward", forwards],
    ]
    if anew:
        rows += [["test_target_parameters, since experts are", f"{anew[2]} of {anew[1]}"]]
    intro = (
        f"Measured: {where[0]}; `python scripts/peft_suite.py`, [files](compatibility-suite.md)."
    )
    body = table(["claim", "found"], rows)
    return f"## Models of PEFT, accelerated\n\n{intro}\n\n{body}"


def gpus() -> list[str]:
    """A section for each run of `make gpu` on a GPU."""
    sections = []
    for path, document in gpu_runs():
        stages = document.get("stages", {})
        rows = [[name, stages[name]["status"], stages[name]["summary"]] for name in stages]
        body = table(["stage", "status", "summary"], rows)
        folder = path.parent.relative_to(ROOT)
        where = (
            f"Measured: {place(document['machine'])}; `make gpu`, [report](../{folder}/report.md)."
        )
        sections.append(f"## {document['machine']['name']}\n\n{where}\n\n{body}")
    return sections


def nightly() -> str:
    """When each slice of the nightly run last ran; those of the same tests are one row."""
    known = json.loads((RESULTS / "nightly.json").read_text())
    groups: dict[str, list[str]] = {}
    for name in SLICES:
        groups.setdefault(re.sub(r"(:.*|( \d+)? \d+/\d+)$", "", name), []).append(name)
    rows = []
    for group, names in groups.items():
        ran = [known[name] for name in names if name in known]
        facts = [sorted({each[key] for each in ran}) for key in ("date", "processor", "torch")]
        passed = f"{sum(each['passed'] for each in ran)} of {len(names)}" if ran else "never"
        rows.append([group, passed, *("; ".join(found) for found in facts)])
    body = table(["slices", "passed", "last ran", "on", "torch"], rows)
    intro = (
        "`make nightly` runs all slices and records them; each run of CI has one more, in turn, "
        "without a record."
    )
    return f"## What runs only at night\n\n{intro}\n\n{body}"


def page() -> str:
    measured = [cpu_targets(), models(), fine_tuning(), peft()]
    sections = [HEAD.strip(), kernels(), *gpus(), *measured, nightly()]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        if PAGE.read_text() != text:
            sys.exit("docs/verification.md is stale: run python scripts/verification.py")
    else:
        PAGE.write_text(text)
