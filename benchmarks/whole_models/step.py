"""A training step and a forward of a variant, their time and their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.quantized import workspace

from ..memory import peak_bytes
from ..shapes import DROPOUT
from ..timing import Plan, compared
from .calls import forward_of, inner, step_of, with_adapters
from .cases import Case, base_model, inputs

# Accelerated: the model of PEFT that the name begins with, after lora_ext.accelerate.
LABELS = {
    "frozen": "frozen",
    "ours": "ours",
    "ours_fp32": "ours, float32 adapters",
    "peft": "PEFT, bf16 adapters",
    "peft_default": "PEFT default",
    "peft_accelerated": "PEFT, bf16 adapters, accelerated",
    "peft_default_accelerated": "PEFT default, accelerated",
}
VARIANTS = tuple(LABELS)
_COPIES = 3
_WARMUP_STEPS = 2


def adapted(case: Case, base: nn.Module, variant: str) -> nn.Module:
    """A copy of the base with the variant's adapters; "frozen" has none."""
    model = with_adapters(copy.deepcopy(base), variant, **words_of(case, base))
    if variant.endswith("accelerated"):
        check_fused(model)
    return inner(model, variant)


def words_of(case: Case, base: nn.Module) -> dict[str, Any]:
    """Of PEFT's config."""
    paths = [path for path, module in base.named_modules() if case.is_target(path, module)]
    return {"target_modules": paths, "lora_dropout": DROPOUT}


def check_fused(model: nn.Module) -> None:
    """Raises RuntimeError if a layer would not take the path that is to be measured."""
    others = [layer for layer in lora_ext.explain(model) if layer.path not in ("fused", "library")]
    if others:
        raise RuntimeError(f"expected all layers on the fused op, but got {others}")


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
        if case.is_target(path, module)
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
    result: dict[str, Any] = {"id": case.id, "form": case.form, "workspace": 0}
    result |= {"memory": {}, "forward_memory": {}}
    calls: dict[str, dict[str, Callable[[], None]]] = {"timing": {}, "forward": {}}
    for variant in VARIANTS:
        progress(f"{case.id}: {variant}")
        model = adapted(case, base, variant)
        calls["timing"][variant] = step = step_of(model, pairs)
        # bitsandbytes changes its weight for good in a forward in eval, and cannot train then.
        served = adapted(case, base, variant) if case.form else model
        calls["forward"][variant] = forward = forward_of(served, pairs)
        for _ in range(_WARMUP_STEPS):
            step()
            forward()
        for key, call in (("memory", step), ("forward_memory", forward)):
            workspace.release()  # counts where it is allocated
            result[key][variant] = {"peak": peak_bytes(call)}
            result["workspace"] = max(result["workspace"], workspace.nbytes())
        if variant == "frozen":
            result["inputs_to_save"] = inputs_to_save(case, model, pairs[0])
    for what, functions in calls.items():
        progress(f"{case.id}: {'a step' if what == 'timing' else 'a forward'}")
        result[what] = compared(functions, plan)
    return result
