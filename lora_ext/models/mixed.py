"""`use_adapters`: selects an adapter for each sample, or each token, of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model_layers import per_row_modules
from ..nn import LoRALayer
from ..nn.adapter_spec import expect
from ..rows.row_adapters import RowAdapters, entered
from ..torch_state import outside_inference


@contextmanager
def use_adapters(
    model: nn.Module,
    adapter_names: Sequence[str | None],
    index: Tensor | None = None,
    *,
    repeats: int = 1,
) -> Iterator[nn.Module]:
    """Within the block each sample, or each token, has its own adapter, or none.

        y[m] = base(x)[m] + scaling_g (drop(x)[m] A_g^T) B_g^T        g the adapter of row m

    The active adapters are not used. It works in forward and backward, also in training: the
    gradient of an adapter is that of its own rows. A layer that lacks an adapter computes the base
    alone for the rows of this adapter.

        with lora_ext.use_adapters(model, ["fr", "de", None]):      # a name for each sample
            loss = model(**batch).loss
        with lora_ext.use_adapters(model, ["fr", "de"], index):     # index [batch], [batch, tokens]
            model.generate(**batch)

    Args:
        model: with layers of `apply_lora`, with an `AdapterPool`, or a model of PEFT after
            `accelerate`.
        adapter_names: one for each sample of the batch, None for the base alone; or, with an index,
            distinct names, which the index refers to.
        index: int32 ``[batch]`` or ``[batch, tokens]``, from -1 (the base alone) to len(names) - 1.
            If the model gets one token of each sample, as in the steps of generate, the last index
            of each sample is used. The index is read when the block is entered.
        repeats: how often generate repeats each sample, next to itself ([a, a, b, b]): the larger
            of num_beams and num_return_sequences. x may have batch or batch * repeats samples.

    Raises:
        IndexError: a value in index is out of range.
        RuntimeError: another thread has a block open; a block that was entered later in this task
            is still open; in a forward: adapters are merged.
        TypeError: an argument has another type.
        ValueError: a name is unknown; in a forward: rows are not those of the samples, or a layer
            of PEFT cannot give rows different adapters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"lora_ext.use_adapters: expected a model (nn.Module), but got {type(model).__name__}"
        )
    layers, others = per_row_modules(model)
    own = [layer for layer in layers if isinstance(layer, LoRALayer)]
    if not layers:
        what = "PEFT's layers, not accelerated" if others else "no layer with adapters"
        raise ValueError(
            f"lora_ext.use_adapters: expected a model after apply_lora, with an AdapterPool, or of "
            f"PEFT after lora_ext.accelerate, but the {type(model).__name__} has {what}"
        )
    distinct, index = _checked(adapter_names, index, repeats)
    _check_known(distinct, layers)
    if others and index.dim() != 1:
        raise ValueError(
            "lora_ext.use_adapters: expected an index of samples [batch], since PEFT's "
            f"{type(others[0]).__name__} cannot give tokens of one sample different adapters, but "
            f"got {list(index.shape)}"
        )
    with outside_inference():  # a training step in the block saves it for backward
        index = index.detach().to(_device_of(layers[0]), copy=True)
        slots = _slots(own, distinct, index)
    with entered(RowAdapters(distinct, index, layers, others, slots, repeats)):
        yield model


def _checked(
    names: Sequence[str | None], index: Tensor | None, repeats: int
) -> tuple[list[str], Tensor]:
    """(distinct names, int32 index)."""
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(
            "lora_ext.use_adapters: expected names as a sequence of strings, or None for the base "
            f"model, but got {names!r}"
        )
    is_count = isinstance(repeats, int) and repeats >= 1
    expect(is_count, "use_adapters", "repeats of 1 or more", repeats)
    if index is None:
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        places: dict[str | None, int] = {name: place for place, name in enumerate(distinct)}
        places[None] = -1
        return distinct, torch.tensor([places[name] for name in names], dtype=torch.int32)
    distinct = [name for name in names if name is not None]
    expect(
        len(distinct) == len(set(distinct)) == len(names),
        "use_adapters",
        "distinct names, without None, beside an index (-1 is the base model)",
        list(names),
    )
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(
            f"lora_ext.use_adapters: expected an int32 tensor as index, but got {got}; convert it "
            "with .to(torch.int32)"
        )
    shape = list(index.shape)
    expect(len(shape) in (1, 2), "use_adapters", "an index [batch] or [batch, tokens]", shape)
    if index.is_cpu and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= len(distinct):
            raise IndexError(
                f"lora_ext.use_adapters: expected an index from -1 to {len(distinct) - 1} for "
                f"{len(distinct)} names, but got {low if low < -1 else high}"
            )
    return distinct, index


def _names_of(layer: Any) -> set[str]:
    if isinstance(layer, LoRALayer):
        return {*layer.adapters, *(() if layer.pool is None else layer.pool.names)}
    return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}


def _check_known(names: Sequence[str], layers: Sequence[Any]) -> None:
    missing = set(names)
    for layer in layers:
        if not missing:
            return
        missing -= _names_of(layer)
    if missing:
        known = {name for layer in layers for name in _names_of(layer)}
        raise ValueError(
            f"lora_ext.use_adapters: expected names out of {sorted(known)}, or None for the base, "
            f"but got {sorted(missing)}"
        )


def _device_of(layer: Any) -> torch.device:
    if isinstance(layer, LoRALayer):
        return layer.stored_weight.device
    return next(layer.base_layer.parameters()).device


def _slots(layers: Sequence[LoRALayer], names: Sequence[str], index: Tensor) -> Tensor | None:
    """The index with slots of the pool instead of names, if all names belong to the pool."""
    pool = next((layer.pool for layer in layers if layer.pool is not None), None)
    if pool is None or not all(name in pool.names for name in names):
        return None
    table = torch.tensor([-1, *(pool.names[name] for name in names)], dtype=torch.int32)
    return table.to(index.device)[index + 1]
