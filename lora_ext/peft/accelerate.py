"""`accelerate` runs a PEFT model on the fused op, `decelerate` undoes this."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from ..packing import pack_for
from ..versions import SUPPORTED, refusal

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    *,
    pack: bool | int | Iterable[int] = False,
    expert_dropout: float | None = None,
) -> Model:
    """Runs the LoRA layers of a PEFT model on the fused op, in place.

        model = lora_ext.accelerate(get_peft_model(base, LoraConfig(...)))

    Each LoRA layer gets a subclass of its PEFT class with another forward; nothing else about it
    changes. State dict, checkpoints, ``save_pretrained``, merging, adding, switching, disabling and
    deleting adapters are PEFT's own code on PEFT's own parameters. Layers that later adapters add
    are accelerated too. A call that a layer cannot compute faster uses PEFT's forward; this is
    decided in each call. ``print(lora_ext.explain(model))`` shows which layers do so and why.

    Args:
        model: a PeftModel, or any module that holds PEFT's LoRA layers: a transformers model after
            ``add_adapter``, one that ``inject_adapter_in_model`` changed, a part of them.
        pack: on a CPU, also keep copies of frozen weights in oneDNN's packed layout where this was
            measured to be faster here: True, or the rows (batch times sequence length) of later
            calls. `lora_ext.warmup` does the same, but has a memory budget and reports its results.
        expert_dropout: probability in [0, 1) that an element of the input of an adapter on the
            experts of a mixture is zero, in training. PEFT refuses lora_dropout for these; here
            the LoraConfig has lora_dropout 0 and the probability is given in each `accelerate`,
            since files do not store it. Adapters that are added later have it, too. None leaves it
            as it is, 0 turns it off.

    Returns:
        The model. A second call changes nothing. If all layers are of unsupported kinds, such as
        those of AdaLoRA, a warning names them.

    Raises:
        ImportError: peft is not installed, or older than `lora_ext.versions` says.
        TypeError: model is not an nn.Module.
        ValueError: no module of it is a LoRA layer of PEFT; expert_dropout is out of its range, or
            there are no experts with adapters, or some need PEFT's forward. The model is then
            unchanged.
    """
    _check(model, "accelerate")
    _import_peft("accelerate")
    from peft.tuners.lora import LoraLayer

    from . import experts
    from .swap import classes, swap

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            "lora_ext.accelerate: expected a model with LoRA layers of PEFT, but got a "
            f"{type(model).__name__} without one; call peft.get_peft_model(model, LoraConfig(...)) "
            "first, or use lora_ext.apply_lora instead of PEFT"
        )
    if expert_dropout is not None:
        experts.check_has_dropout(model, expert_dropout)
    swap(model)
    experts.warn_of_packed(model)
    if expert_dropout is not None:
        experts.put_dropout(model, expert_dropout)
    if not any(type(layer) in classes().values() for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        warnings.warn(
            "lora_ext.accelerate: nothing was accelerated, since lora_ext has no forward for the "
            f"model's layers ({kinds}); PEFT computes them as before",
            stacklevel=2,
        )
    pack_for(model, pack)
    return model


def decelerate(model: Model) -> Model:
    """Restores PEFT's classes in the layers that `accelerate` changed, in place.

    Returns:
        The model; one that was not accelerated is left as it is.

    Raises:
        ImportError: peft is not installed.
        TypeError: model is not an nn.Module.
    """
    _check(model, "decelerate")
    _import_peft("decelerate")
    from .experts import remove_dropout
    from .swap import swap

    swap(model, back=True)
    remove_dropout(model)
    return model


def _check(model: object, function: str) -> None:
    if isinstance(model, nn.Module):
        return
    parts = vars(model).items() if hasattr(model, "__dict__") else ()
    held = {name: part for name, part in parts if isinstance(part, nn.Module)}
    adapted = [
        name for name, part in held.items() if any("lora_A" in m._modules for m in part.modules())
    ]
    # A pipeline of diffusers.
    names = [f"pipe.{name}" for name in adapted or held]
    raise TypeError(
        f"lora_ext.{function}: expected a model (nn.Module), but got {type(model).__name__}"
        + f"; give the model that it holds: {' or '.join(names)}" * bool(names)
    )


def _import_peft(function: str) -> None:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"lora_ext.{function}: expected PEFT, but it is not installed; pip install peft"
        ) from error
    # An older one lacks attributes of layers, which would fail only in a forward.
    if old := refusal("peft", peft.__version__):
        raise ImportError(f"lora_ext.{function}: {old}")
    try:
        from . import swap  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"lora_ext.{function}: expected PEFT as tested, up to {SUPPORTED['peft'][1]}, but got "
            f"{peft.__version__}, which lacks something: {error}; install the tested version"
        ) from error
