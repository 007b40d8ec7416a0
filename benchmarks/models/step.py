"""One training step of a variant, its time and its memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

from ..memory import peak_bytes
from ..shapes import DROPOUT
from ..timing import CpuMeter, Plan, calibrate, interleaved
from .cases import Case, base_model, inputs

RANK, ALPHA = 16, 32
VARIANTS = ("frozen", "ours", "ours_fp32", "peft", "peft_default")
_COPIES = 3
_WARMUP_STEPS = 2


def adapted(case: Case, base: nn.Module, variant: str) -> nn.Module:
    """A copy of the base with the variant's adapters; "frozen" has none."""
    model = copy.deepcopy(base)
    paths = [path for path, m in model.named_modules() if type(m) is nn.Linear]
    paths = [path for path in paths if case.is_target(path)]
    torch.manual_seed(0)
    if variant == "frozen":
        return model
    if variant.startswith("ours"):
        dtype = torch.float32 if variant == "ours_fp32" else getattr(torch, case.dtype)
        config = lora_ext.LoRAConfig(
            paths, r=RANK, alpha=ALPHA, dropout=DROPOUT, adapter_dtype=dtype
        )
        return lora_ext.apply_lora(model, config)
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=paths)
    return peft.get_peft_model(
        model, config, autocast_adapter_dtype=variant == "peft_default"
    ).base_model.model


def step_of(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Forward and backward on the next input; gradients are dropped before each step."""
    rotation = itertools.cycle(pairs)
    leaves = [p for p in model.parameters() if p.requires_grad] + [x for x, _ in pairs]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        x, grad = next(rotation)
        model(inputs_embeds=x).last_hidden_state.backward(grad)

    return step


def inputs_to_save(case: Case, model: nn.Module, pair: tuple[Tensor, Tensor]) -> int:
    """Bytes of the distinct inputs of adapted layers that the frozen model does not save anyway."""
    kept: dict[int, Tensor] = {}
    saved: dict[int, Tensor] = {}

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[arguments[0].untyped_storage().data_ptr()] = arguments[0]

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    handles = [
        module.register_forward_pre_hook(keep)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and case.is_target(path)
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=pair[0])
    for handle in handles:
        handle.remove()
    own = pair[0].untyped_storage().data_ptr()  # the input itself is live before the step
    return sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in saved and pointer != own
    )


def measure(case: Case, plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """Times and peaks of all variants of a case, as plain JSON."""
    base = base_model(case)
    pairs = inputs(case, base, _COPIES)
    result: dict[str, Any] = {"id": case.id, "timing": {}, "peak": {}, "trainable": {}}
    steps = {}
    for variant in VARIANTS:
        progress(f"{case.id}: {variant}")
        model = adapted(case, base, variant)
        steps[variant] = step_of(model, pairs)
        for _ in range(_WARMUP_STEPS):
            steps[variant]()
        result["peak"][variant] = peak_bytes(steps[variant])
        result["trainable"][variant] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if variant == "frozen":
            result["inputs_to_save"] = inputs_to_save(case, model, pairs[0])
    progress(f"{case.id}: timing")
    meter = CpuMeter()
    timings = {name: calibrate(step, meter, plan) for name, step in steps.items()}
    interleaved(steps, timings, meter, plan)
    result["timing"] = {name: timing.summary() for name, timing in timings.items()}
    return result
