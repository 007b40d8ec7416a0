"""Mixtures of experts: one token, a forward and a step, over the frozen model's.

The frozen model runs transformers' own implementation; PEFT's models are as they are and
accelerated, with bfloat16 adapters on attention and experts, and by PEFT's defaults: all-linear,
the router too, in float32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lora_ext

from ..markdown import Column, quotient, table_of
from ..memory import peak_bytes
from ..results import Row, ratio
from ..timing import Plan, compared
from .calls import inner, with_adapters
from .calls import step_of as step_on

TOKENS = 1024
_COPIES = 3
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_LABELS = {
    "peft": "PEFT",
    "peft_accelerated": "PEFT, accelerated",
    "peft_default": "PEFT default",
    "peft_default_accelerated": "PEFT default, accelerated",
}
VARIANTS = ("frozen", *_LABELS)


@dataclass(frozen=True)
class Mixture:
    """A Qwen3-MoE of random weights, 8 experts for each token."""

    name: str
    experts: int
    hidden: int
    inner: int  # of an expert
    layers: int
    slots: int = 8

    def read_bytes(self) -> int:
        """Of the experts' bfloat16 weights that one token reads."""
        return self.layers * self.slots * 3 * self.hidden * self.inner * 2


MIXTURES = (
    Mixture("32 experts, 3 layers", 32, 1024, 512, 3),
    Mixture("OLMoE's layer", 64, 2048, 1024, 1),
    Mixture("Qwen3-30B-A3B's layer", 128, 2048, 768, 1),
)


def base_model(mixture: Mixture, device: str = "cpu") -> nn.Module:
    """The frozen model in training mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        num_experts=mixture.experts,
        num_experts_per_tok=mixture.slots,
        hidden_size=mixture.hidden,
        moe_intermediate_size=mixture.inner,
        num_hidden_layers=mixture.layers,
        num_attention_heads=mixture.hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=1024,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = transformers.Qwen3MoeModel(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    return model.train().requires_grad_(False)


def adapted(base: nn.Module, variant: str) -> nn.Module:
    """The base with the variant's adapters; the frozen weights are the same tensors."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    words: dict[str, Any] = {"target_modules": _ATTENTION, "target_parameters": _EXPERTS}
    if variant.startswith("peft_default"):
        words = {"target_modules": "all-linear"}
    model = with_adapters(model, variant, **words)
    if variant.endswith("accelerated"):
        left = [layer for layer in lora_ext.explain(model) if layer.path == "peft"]
        if left:
            raise RuntimeError(f"expected no layer on PEFT's own forward, but got {left}")
    return inner(model, variant)


def forward_of(model: nn.Module, tokens: int) -> Callable[[], None]:
    """A forward without gradients of so many tokens, others each time."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(1024, (1, tokens), generator=generator) for _ in range(_COPIES)]
    device = next(model.parameters()).device
    given = itertools.cycle([ids.to(device) for ids in drawn])

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=next(given))

    return forward


def step_of(model: nn.Module, tokens: int = TOKENS) -> Callable[[], None]:
    """Forward and backward of so many tokens, gradients of the adapters and of the input."""
    generator = torch.Generator().manual_seed(1)
    width = model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
    shape, device = (1, tokens, width), next(model.parameters()).device
    drawn = [torch.randn(shape, generator=generator) for _ in range(_COPIES + 1)]
    grad, *inputs = [x.bfloat16().to(device) for x in drawn]
    return step_on(model, [(x.requires_grad_(), grad) for x in inputs])


def measure(
    plan: Plan, progress: Callable[[str], None], mixtures: Sequence[Mixture] = MIXTURES
) -> list[Row]:
    """Times of each, peaks of a step and bytes of its adapters' gradients, as plain JSON."""
    rows = []
    for mixture in mixtures:
        progress(f"{mixture.name}: makes the models")
        base = base_model(mixture)
        models = {variant: adapted(base, variant) for variant in VARIANTS}
        works = {
            "1 token": {name: forward_of(model, 1) for name, model in models.items()},
            f"forward, {TOKENS} tokens": {
                name: forward_of(model, TOKENS) for name, model in models.items()
            },
            f"step, {TOKENS} tokens": {name: step_of(model) for name, model in models.items()},
        }
        for work, calls in works.items():
            progress(f"{mixture.name}: {work}")
            # Here, not in the call: that goes through all modules, of which adapters are many.
            for model in models.values():
                model.train(work.startswith("step"))
            row: dict[str, Any] = {"id": f"{mixture.name}, {work}", "memory": {}, "gradients": {}}
            row["read_bytes"] = mixture.read_bytes() if work == "1 token" else 0
            if work.startswith("step"):
                row["memory"] = {name: {"peak": peak_bytes(call)} for name, call in calls.items()}
                row["gradients"] = {
                    name: sum(p.nbytes for p in model.parameters() if p.requires_grad)
                    for name, model in models.items()
                }
            row["timing"] = compared(calls, plan)
            rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of the frozen model, times over its, and peaks of a step over its."""

    def frozen(row: Row) -> str:
        ms = row["timing"]["frozen"]["ms"]
        rate = f", {row['read_bytes'] / ms / 1e6:.1f} GB/s" if row["read_bytes"] else ""
        return f"{ms:.1f} ms{rate}"

    def peak(row: Row, name: str) -> str:
        if not row["memory"]:
            return ""
        least = row["memory"]["frozen"]["peak"] + row["gradients"][name]
        return f"{row['memory'][name]['peak'] / least:.2f}"

    columns: list[Column] = [("model, work", lambda row: row["id"]), ("frozen", frozen)]
    for name, label in _LABELS.items():
        columns.append((label, lambda row, n=name: quotient(ratio(row, n, "frozen"), spread=True)))
    for name, label in _LABELS.items():
        columns.append((f"{label}: peak", lambda row, n=name: peak(row, n)))
    return table_of(rows, columns)
