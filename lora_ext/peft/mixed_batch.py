"""Layers of PEFT in a batch whose rows have different adapters, and PEFT's adapter_names.

    y[m] = base(x)[m] + scaling_g * ((drop(x)[m] A_g^T) B_g^T + bias_g)       g: adapter of row m

PEFT loops over the adapters, each with a copy of its samples, and raises an error in training.
Cases that are not computed here are left to that loop if a name for each sample is sufficient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..call.apply import Dense, apply, mixed_lookup
from ..call.updates import Update, updates_obstacle
from ..nn.row_adapters import BASE_NAME, RowAdapters, entered, forget
from ..quantized.base import QuantizedBase
from ..torch_state import is_plain, outside_inference
from .operands import fast_path_updates, operand_of, update_of
from .per_row_modules import per_row_modules
from .reasons import (
    ADDED,
    BASE,
    FUSED,
    PEFT,
    adapter_reason,
    adapters_state,
    base_obstacle,
    dequantized_base,
    embedding_reason,
    input_reason,
)
from .variants import row_reason

_BY_ROW = "each row its own adapter"


class ByRow:
    """A mix-in placed before a class of PEFT whose rows can have different adapters."""

    row_adapters: Any = None  # as in lora_ext.nn.LoRALayer

    def delete_adapter(self: Any, adapter_name: str) -> None:
        forget(self, adapter_name)
        LoraLayer.delete_adapter(self, adapter_name)


def linear(
    layer: Any, theirs: Any, x: Tensor, rows: RowAdapters, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """The forward of a linear layer within a block.

    Args:
        theirs: PEFT's class of the layer.
        args, kwargs: of the forward, besides x; the rows with aLoRA's adapters are in the block.
    """
    kwargs.pop("alora_offsets", None)
    if layer._disable_adapters or "adapter_names" in kwargs:
        return theirs.forward(layer, x, *args, **kwargs)
    tables = layer._modules
    table = tables["lora_A"]._modules
    names = [name for name in rows.names if name in table]
    reason = _reason(layer, names, rows, args, kwargs) or input_reason(layer, x, names)
    updates = fast_path_updates(layer, names)
    if updates is None:
        for name in names:
            reason = reason or adapter_reason(layer, name)
    reason = reason or _rows_reason(x, rows)
    if reason:
        return _left_to_peft(layer, theirs, x, rows, reason, args, kwargs)
    base = tables["base_layer"]
    if not names:
        return base(x)
    if updates is None:
        updates = [update_of(layer, name) for name in names]
    if not _kept(layer, x, updates):
        return apply(Dense(operand_of(layer), base.bias), x, updates, rows)
    found = dequantized_base(base, x)
    if isinstance(found, QuantizedBase):
        return apply(found, x, updates, rows)
    y = base(x)
    if not is_plain(y) or y.shape[:-1] != x.shape[:-1]:
        return _left_to_peft(layer, theirs, x, rows, "the base's y is not plain", args, kwargs)
    return apply(y, x, updates, rows)


def linear_path(layer: Any, rows: RowAdapters | None) -> tuple[str, str]:
    """(path, reason) of a linear layer within a block, for `lora_ext.explain`."""
    assert rows is not None
    names = [name for name in rows.names if name in layer.lora_A]
    reason = _reason(layer, names, rows, (), {})
    for name in names:
        reason = reason or adapter_reason(layer, name)
    base = layer._modules["base_layer"]
    kept = base_obstacle(base)
    return _path(layer, names, reason, kept if kept and _is_called(base) else "")


def embedding_path(layer: Any, rows: RowAdapters | None) -> tuple[str, str]:
    """(path, reason) of an embedding layer within a block, for `lora_ext.explain`."""
    assert rows is not None
    names = [name for name in rows.names if name in layer.lora_embedding_A]
    reason = _reason(layer, names, rows, (), {}) or embedding_reason(layer, None, names)
    return _path(layer, names, reason, "a lookup for each, and a small product")


def _path(layer: Any, names: Sequence[str], reason: str, kept: str) -> tuple[str, str]:
    if layer._disable_adapters:
        return BASE, "adapters are disabled"
    if reason:
        return PEFT, f"{_BY_ROW}, in PEFT's loop: {reason}"
    if not names:
        return BASE, "none of the adapters that rows have is in this layer"
    what = f"{_BY_ROW}, {len(names)} in this batch"
    return (ADDED, f"{what}: {kept}") if kept else (FUSED, what)


def embedding(
    layer: Any, theirs: Any, ids: Tensor, rows: RowAdapters, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """The forward of an embedding layer within a block; arguments as in `linear`."""
    kwargs.pop("alora_offsets", None)
    if layer._disable_adapters or "adapter_names" in kwargs:
        return theirs.forward(layer, ids, *args, **kwargs)
    names = [name for name in rows.names if name in layer.lora_embedding_A]
    reason = _reason(layer, names, rows, args, kwargs) or embedding_reason(layer, ids, names)
    reason = reason or _rows_reason(ids, rows)
    if reason:
        return _left_to_peft(layer, theirs, ids, rows, reason, args, kwargs)
    base = layer._modules["base_layer"]
    y = base(ids)
    if not names:
        return y
    table, other = layer.lora_embedding_A, layer.lora_embedding_B
    updates = [Update(n, table[n], other[n], None, layer.scaling[n], 0.0) for n in names]

    def look_up(columns: Tensor) -> Tensor:
        by_count = base.scale_grad_by_freq
        return F.embedding(ids, columns, base.padding_idx, scale_grad_by_freq=by_count)

    return mixed_lookup(y, ids, updates, rows, look_up)


def _reason(
    layer: Any, names: Sequence[str], rows: RowAdapters, args: tuple, kwargs: dict[str, Any]
) -> str:
    """Why rows of a layer need PEFT's own forward for any x."""
    if layer.merged_adapters:
        return f"{layer.merged_adapters} are merged into the weight; call unmerge_adapter first"
    state = adapters_state(layer)
    if state is not None and state[0] == PEFT:
        return state[1]
    if args or kwargs:
        return "the layer gets more than x"
    return row_reason(layer, names, rows.is_pefts)


def _rows_reason(x: Tensor, rows: RowAdapters) -> str:
    """With PEFT's adapter_names: why PEFT has to raise its error for rows that do not fit them."""
    if rows.is_pefts and (x.dim() == 0 or len(x) != len(rows.index)):
        return "the number of samples is another"
    return ""


def _is_called(base: Any) -> bool:
    """For a base that is not a plain weight: whether it is called, since it is not dequantised."""
    return not isinstance(dequantized_base(base, None), QuantizedBase)


def _kept(layer: Any, x: Tensor, updates: Sequence[Update]) -> str:
    """Why the base's own forward has to be called, or ""."""
    base = layer._modules["base_layer"]
    reason = base_obstacle(base)
    if reason:
        return reason
    if base.weight.requires_grad and torch.is_grad_enabled():
        return "the base weight is trained"
    return updates_obstacle(base.weight.dtype, x, updates, rows=True)


def _left_to_peft(
    layer: Any, theirs: Any, x: Tensor, rows: RowAdapters, reason: str, args: tuple, kwargs: dict
) -> Tensor:
    """PEFT's loop, if it supports the case and computes it correctly.

    Raises:
        ValueError: it does not.
    """
    names = rows.sample_names(BASE_NAME)
    here = [name for name in rows.names if name in known_names(layer)]
    refused = layer.merged_adapters or row_reason(layer, here, rows.is_pefts)
    if rows.is_pefts or (names is not None and len(x) == len(names) and not refused):
        return theirs.forward(layer, x, *args, adapter_names=names, **kwargs)
    raise ValueError(
        f"lora_ext.use_adapters: expected a layer whose rows can have different adapters, but in a "
        f"{type(layer).__name__} {reason}"
    )


def known_names(layer: Any) -> set[str]:
    """Names of the adapters of a LoRA layer of PEFT; all wrappers of a chain have the same."""
    return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}


@contextmanager
def of_call(model: Any, names: Any, num_beams: Any) -> Iterator[None]:
    """The adapter_names of one call of a model, checked as PEFT checks them.

    Raises:
        TypeError, ValueError: PEFT's errors, except the one for training.
    """
    fast, others = per_row_modules(model)
    unknown = {name for name in names if name != BASE_NAME}
    for layer in (*fast, *others):
        if unknown and isinstance(layer, LoraLayer):
            unknown -= known_names(layer)
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )
    original = names = list(names) if isinstance(names, tuple) else names
    is_beams = isinstance(num_beams, int) and num_beams > 1
    if is_beams:
        if not isinstance(names, list):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        names = [name for name in names for _ in range(num_beams)]
    encoder = _encoder_of(model.model) if is_beams else None
    inside = set() if encoder is None else {id(module) for module in encoder.modules()}
    with ExitStack() as stack:
        for given, is_inside in ((names, False), (original, True)):
            own = [layer for layer in fast if (id(layer) in inside) == is_inside]
            rest = [module for module in others if (id(module) in inside) == is_inside]
            stack.enter_context(entered(_rows_of(given, own, rest)))
        yield


def _rows_of(names: Sequence[str], layers: Sequence[Any], others: Sequence[Any]) -> RowAdapters:
    distinct = list(dict.fromkeys(name for name in names if name != BASE_NAME))
    places = {name: place for place, name in enumerate(distinct)} | {BASE_NAME: -1}
    device = next((p.device for layer in layers[:1] for p in layer.parameters()), None)
    with outside_inference():
        index = torch.tensor([places[name] for name in names], dtype=torch.int32, device=device)
    return RowAdapters(distinct, index, layers, others, is_pefts=True)


def _encoder_of(model: Any) -> Any:
    from peft.tuners.lora import model as peft_model

    return peft_model._get_encoder(model)
