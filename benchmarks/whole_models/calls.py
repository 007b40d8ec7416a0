"""Models with adapters, and steps and forwards of them, or of a layer, on inputs that rotate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

RANK, ALPHA = 16, 32
Pairs = Iterable[tuple[Tensor, Tensor]]  # (embedded tokens, gradient of the output)


def with_adapters(
    model: nn.Module, variant: str, names: Sequence[str] = ("default",), **words: Any
) -> Any:
    """The model with adapters of a variant, all of them active; PEFT's in its own around it.

    PEFT's default, and "ours_fp32", are float32, whatever the base has; the others have its dtype.

    Args:
        words: of PEFT's config, which ours takes as it is.
    """
    torch.manual_seed(0)
    if variant == "frozen":
        return model
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **words)
    if variant.startswith("ours"):
        dtype = torch.float32 if variant == "ours_fp32" else next(model.parameters()).dtype
        for name in names:
            lora_ext.apply_lora(model, config, name, adapter_dtype=dtype)
        lora_ext.set_adapter(model, list(names))
        return model
    wide = variant.startswith("peft_default")
    wrapped = peft.get_peft_model(model, config, names[0], autocast_adapter_dtype=wide)
    for name in names[1:]:
        wrapped.add_adapter(name, config, autocast_adapter_dtype=wide)
    wrapped.base_model.set_adapter(list(names))
    return lora_ext.accelerate(wrapped) if variant.endswith("accelerated") else wrapped


def inner(model: Any, variant: str) -> nn.Module:
    """Without what PEFT has around it."""
    return model.base_model.model if variant.startswith("peft") else model


def hidden(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """call(x): the last hidden state of a model of transformers."""
    return lambda x: model(inputs_embeds=x).last_hidden_state


def step_of(
    model: nn.Module, pairs: Pairs, call: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """Forward and backward on the next input; gradients are dropped before each step.

    call: of the model; by default `hidden`
    """
    call = call or hidden(model)
    rotation = itertools.cycle(pairs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        x, grad = next(rotation)
        for leaf in (x, *trained):
            leaf.grad = None
        call(x).backward(grad)

    return step


def forward_of(
    model: nn.Module, pairs: Pairs, call: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """A forward for inference on the next input; the model is in eval mode within it."""
    call = call or hidden(model)
    rotation = itertools.cycle(pairs)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            call(next(rotation)[0].detach())
        model.train()

    return forward
