"""PEFT's embedding layers: a lookup in A, and a small product added onto the base's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import variants
from torch import Tensor, nn

from ..nn.row_adapters import RowAdapters
from ..nn.updates import Update, is_traced
from . import by_rows, dora
from .reasons import (
    ADDED,
    BASE,
    PEFT,
    ForwardPath,
    active_names,
    adapters_state,
    has_hooks,
    is_plain,
)
from .row_blocks import combine


class Embedding(peft_layers.Embedding):
    """`peft.tuners.lora.Embedding` with another forward and nothing else.

        y = base(ids) + sum over active adapters of scaling * A[:, ids]^T B^T
        y = g * (base(ids) + scaling * A[:, ids]^T B^T)                       for DoRA (`dora`)

    Shape:
        ids ``[...]`` to y ``[..., embedding_dim]`` in the base weight's dtype.
    """

    row_adapters: Any = None  # as of `lora_ext.nn.LoRALayer`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "row_adapters" in self.__dict__:
            rows = by_rows.rows_of_call(self, x, args, kwargs)
            if rows is not None and "adapter_names" not in kwargs:
                return _by_rows(self, x, rows)
        if not (args or kwargs):
            path = embedding_path(self, x)
            if path.name == ADDED:
                return _added(self, x, path)
        return peft_layers.Embedding.forward(self, x, *args, **kwargs)  # by name, as in linear.py

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward is computed, and why."""
        path = embedding_path(self, None)
        return path.name, path.reason


def embedding_path(layer: Any, ids: Tensor | None) -> ForwardPath:
    """The path for ids, or for plain ones if they are None."""
    state = adapters_state(layer)
    if state is not None:
        return ForwardPath(*state)
    table = layer._modules["lora_embedding_A"]._parameters
    names = active_names(layer, table)
    if not names:
        return ForwardPath(BASE, "none of the active adapters is in this layer")
    reason = _reason(layer, ids, names)
    is_dora = not reason and any(name in layer.lora_variant for name in names)
    if is_dora:
        reason = _dora_reason(layer, names)
    if reason:
        return ForwardPath(PEFT, reason)
    updates = [
        Update(name, table[name], layer.lora_embedding_B[name], None, layer.scaling[name], 0.0)
        for name in names
    ]
    what = "DoRA: " if is_dora else ""
    return ForwardPath(ADDED, f"{what}a lookup and a small product by torch", updates, is_dora)


def _reason(layer: Any, ids: Tensor | None, names: Sequence[str]) -> str:
    """Why PEFT's own forward is needed, or ""."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Embedding:
        return "the base layer is not exactly nn.Embedding"
    if base.max_norm is not None or base.sparse:
        return "the base layer has max_norm, which writes to tables, or sparse gradients"
    if any(name in layer.input_fns or name in layer.output_fns for name in names):
        return "the adapters are sharded for tensor parallelism"
    weight = base._parameters.get("weight")
    if weight is None or not (is_plain(weight) and weight.is_floating_point()):
        return "the base weight is computed, quantised or sharded"
    if ids is not None and not is_plain(ids):
        return "the ids are a tensor subclass"
    return ""


def _dora_reason(layer: Any, names: Sequence[str]) -> str:
    """Why adapters that are variants of LoRA need PEFT's forward, or ""."""
    if len(names) > 1:
        return "several active adapters, one of them DoRA"
    if type(layer.lora_variant[names[0]]) is not variants.DoraEmbeddingVariant:
        return "a variant of LoRA other than DoRA"
    if has_hooks(layer._modules["base_layer"]):
        return "DoRA on a base layer with hooks"
    return dora.magnitude_reason(layer, names[0], peft_dora.DoraEmbeddingLayer)


def _added(layer: Any, ids: Tensor, path: ForwardPath) -> Tensor:
    """The base as it is, and the updates onto it."""
    base = layer._modules["base_layer"]
    parts = [_looked_up(base, ids, update.lora_a) for update in path.updates]
    y = base(ids)
    first = path.updates[0]
    if not path.is_dora:
        if len(parts) == 1:
            return combine(y, None, None, parts[0], first.lora_b, first.scaling)
        total = y
        for part, update in zip(parts, path.updates, strict=True):
            total = total + (part @ update.lora_b.t()) * update.scaling
        return total.to(y.dtype)
    table = base.weight
    rounded_to = torch.promote_types(table.dtype, first.lora_a.dtype)
    factor = dora.factor_of(layer, table.t(), first, rounded_to)
    return combine(None, y, factor, parts[0], first.lora_b * factor[:, None], first.scaling)


def _looked_up(base: Any, ids: Tensor, lora_a: Tensor) -> Tensor:
    """A's columns of these ids: ``[..., r]``; those of the padding index get no gradient."""
    words = {"scale_grad_by_freq": base.scale_grad_by_freq}
    return F.embedding(ids, lora_a.t(), base.padding_idx, **words)


def _by_rows(layer: Any, ids: Tensor, rows: RowAdapters) -> Tensor:
    """base(ids) with the update of each id's own adapter, rounded once for each of them."""
    table = layer._modules["lora_embedding_A"]._parameters
    names = [name for name in rows.names if name in table]
    reason = _reason(layer, ids, names)
    if reason or any(name in layer.lora_variant for name in names):
        raise RuntimeError(
            "lora_ext.use_adapters: expected an embedding with plain adapters, but got one that "
            f"PEFT alone computes: {reason or 'a variant of LoRA'}"
        )
    base = layer._modules["base_layer"]
    y = base(ids)
    index = rows.rows_of(ids.unsqueeze(-1))
    for g, name in enumerate(rows.names):
        if name not in table:
            continue

        def added(y: Tensor, ids: Tensor, name: str = name) -> Tensor:
            lookup = _looked_up(base, ids, table[name])
            update = lookup @ layer.lora_embedding_B[name].t() * layer.scaling[name]
            return (y + update).to(y.dtype)

        own = index == g
        if is_traced():  # no shape may depend on whose the ids are
            y = torch.where(own.unsqueeze(-1), added(y, ids), y)
        elif own.any():
            y = y.index_put((own,), added(y[own], ids[own]))
    return y
