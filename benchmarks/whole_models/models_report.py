"""What is said and drawn of steps of whole models: time and memory over frozen, targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import markdown
from ..markdown import Column, mebibytes, milliseconds, quotient, table, table_of
from ..results import Document, Row, median_ratio, peak_ratio, ratio
from . import experts, generate, mixed_batch, packed, quantized, whole_run
from .overhead import overheads
from .step import LABELS

# Time of a step over the frozen model's.
TIME_TARGETS = {
    "ours": 1.06,
    "ours_fp32": 1.15,
    "peft_accelerated": 1.06,
    "peft_default_accelerated": 1.15,
}
# Of each of them, over a frozen model whose linear layers are quantised.
QUANTIZED_TIME_TARGET = 1.15
# How many times faster a step is after lora_ext.accelerate, at least; by the form of the base.
SPEEDUP_TARGETS = {"": 1.5, "nf4": 1.5, "int8": 1.4}
# Python and dispatch of an accelerated layer's call over those of PEFT's.
OVERHEAD_TARGET = 0.5
MEMORY_SLACK = 1.03
_METHOD = """\
- Fine-tuning is embedding, layers, head, loss, backward and AdamW on 2048 tokens of docstrings, on
  Llamas of random weights with a vocabulary of 30522; PEFT's adapters on all linear layers of the
  blocks, r = 16, alpha = 32, a rate of 0.002. Both take turns in one process; the peak is that of a
  process of its own for each, weights and all, after 3 steps.
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
- With an adapter for each sample, ours and PEFT's accelerated model compute the batch at once, by
  `use_adapters` and `adapter_names`. PEFT does so in a forward alone; one after the other, each
  sample is a step of its own, with its adapter active.
- nf4 and int8 are bases whose linear layers are bitsandbytes'; ours dequantise into a workspace,
  which counts in their peaks and in the bound. Single layers have bfloat16 adapters and no bias.
- Packed: after `lora_ext.warmup` for these rows, which keeps copies of weights in oneDNN's layout
  where it measured them to be faster. The frozen model has the same packs: what packing alone
  gives.
- generate makes 16 tokens after a prompt of 16 with a KV cache, greedily, on the shape of a Llama
  of 135M parameters. merged is the model without adapters, whose products are those of a merged
  one.
- Mixtures are Qwen3-MoE of random weights with 8 experts for each token; frozen is transformers'
  own implementation. GB/s are of the experts' weights that one token reads. A peak is over that of
  the frozen model with the adapters' gradients. PEFT default is all-linear in float32, the router
  too.
- The overhead of a layer is a call on 2 x 8 numbers, less the ops that it makes, timed alone."""


def memory_bound(case: Row) -> float:
    """The largest peak allowed, as a multiple of frozen's."""
    more = case["inputs_to_save"] + case.get("workspace", 0)
    return MEMORY_SLACK * (1 + more / case["memory"]["frozen"]["peak"])


def _over_frozen(
    cases: Sequence[Row],
    key: str,
    frozen: Callable[[dict[str, Any]], str],
    over: Callable[[Row, str], str],
    more: Sequence[Column] = (),
) -> str:
    """A table of one of results.TIMES or MEMORIES, each variant as a multiple of frozen."""
    cases = [case for case in cases if key in case]
    names = [name for name in LABELS if any(name in case[key] for case in cases)][1:]
    columns: list[Column] = [("model, layers, base", lambda case: case["id"])]
    columns += [("frozen", lambda case: frozen(case[key]["frozen"])), *more]
    columns += [(LABELS[name], lambda case, n=name: over(case, n)) for name in names]
    return table_of(cases, columns)


def _times(cases: Sequence[Row], key: str) -> str:
    def over(case: Row, name: str) -> str:
        disturbed = " !" if name in case[key] and case[key][name]["disturbed"] else ""
        return quotient(ratio(case, name, "frozen", key), spread=True) + disturbed

    return _over_frozen(cases, key, lambda found: milliseconds(found["ms"]), over)


def _memories(cases: Sequence[Row], key: str) -> str:
    def over(case: Row, name: str) -> str:
        return quotient(peak_ratio(case, name, "frozen", key))

    bound: list[Column] = (
        [("bound", lambda case: quotient(memory_bound(case)))] if key == "memory" else []
    )
    return _over_frozen(cases, key, lambda found: mebibytes(found["peak"]), over, bound)


def target_rows(case: Row) -> list[list[str]]:
    """Limits of time and memory, and how many times faster accelerate makes PEFT's step."""
    rows = []

    def add(name: str, what: str, limit: float, value: float | None, least: bool = False) -> None:
        if value is not None:
            verdict = "met" if (value >= limit if least else value <= limit) else "missed"
            rows.append([case["id"], LABELS[name], what, f"{limit:.2f}", f"{value:.2f}", verdict])

    form = case.get("form", "")
    for name, limit in TIME_TARGETS.items():
        limit = QUANTIZED_TIME_TARGET if form else limit
        add(name, "time", limit, median_ratio(case, name, "frozen"))
        add(name, "peak memory", memory_bound(case), peak_ratio(case, name, "frozen"))
    for name in ("peft", "peft_default"):
        faster = median_ratio(case, name, f"{name}_accelerated")
        limit = SPEEDUP_TARGETS[form]
        add(name, "its time over the accelerated", limit, faster, least=True)
    return rows


def _overheads(overhead: dict[str, Any]) -> str:
    """A table of what a layer's call costs beside its ops."""
    rows, heads = [], []
    for dropout, times in overhead.items():
        theirs, ours = overheads(times)
        us = [*(1000 * found["ms"] for found in times.values()), theirs, ours]
        verdict = "met" if ours / theirs <= OVERHEAD_TARGET else "missed"
        rows.append([dropout, *(f"{one:.1f}" for one in us), f"{ours / theirs:.2f}", verdict])
        heads = ["dropout", *times, "PEFT's overhead", "ours", "ratio"]
    return table([*heads, f"at most {OVERHEAD_TARGET}"], rows)


def _mixed(document: Document, key: str) -> str:
    return mixed_batch.table(document.get("mixed", []), key)


def text(document: Document, images: Sequence[str]) -> str:
    """The report as Markdown."""
    cases, layers = document["cases"], document.get("quantized_layers", [])
    packing = document.get("packed", [])
    columns = ["model, layers, base", "variant", "what", "limit", "value", "verdict"]
    bodies = [
        ("Fine-tuning, the whole run", whole_run.table(document.get("runs", []))),
        ("Time of a step, as a multiple of frozen", _times(cases, "timing")),
        ("Peak memory of a step, as a multiple of frozen", _memories(cases, "memory")),
        ("Time of a forward, as a multiple of frozen", _times(cases, "forward")),
        ("Peak memory of a forward, as a multiple of frozen", _memories(cases, "forward_memory")),
        ("Targets", table(columns, [row for case in cases for row in target_rows(case)])),
        ("A step, each sample with its own adapter", _mixed(document, "timing")),
        ("A forward, each sample with its own adapter", _mixed(document, "forward")),
        ("Single layers over quantised bases", quantized.table(layers)),
        ("A step, weights packed where that is faster", packed.table(packing, "timing")),
        ("A forward, weights packed where that is faster", packed.table(packing, "forward")),
        ("Time of generate, as a multiple of merged", generate.table(document.get("generate", []))),
        ("Mixtures of experts", experts.table(document.get("experts", []))),
        ("Overhead of a layer's call, microseconds", _overheads(document.get("overhead", {}))),
    ]
    return markdown.page(
        "CPU report: a training step of whole models",
        markdown.machine_lines(document),
        *markdown.sections(bodies, "CPU"),
        *markdown.pictures(images, "CPU"),
        *markdown.sections([("Method", _METHOD)], "CPU"),
    )
