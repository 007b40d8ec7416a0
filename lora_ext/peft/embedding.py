"""PEFT's embedding layers: a lookup in A, and a small product added onto the base's output."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layers
from torch import Tensor

from ..call.updates import Update
from ..nn.row_adapters import current_row_adapters
from ..packed_weight import writes_weight
from . import mixed_batch
from .reasons import ADDED, BASE, PEFT, ForwardPath, active_names, adapters_state, embedding_reason
from .row_blocks import combine
from .variants import EMBEDDING, variant_of


class Embedding(mixed_batch.ByRow, peft_layers.Embedding):
    """`peft.tuners.lora.Embedding` with another forward and nothing else.

        y = base(ids) + sum over active adapters of scaling * A[:, ids]^T B^T
        y = g * (base(ids) + scaling * A[:, ids]^T B^T)                       for DoRA (`dora`)

    Shape:
        ids ``[...]`` to y ``[..., embedding_dim]`` in the base weight's dtype.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self, "row_adapters", None) is not None:  # absent after `decelerate`
            rows = current_row_adapters(self)
            if rows is not None:
                return mixed_batch.embedding(self, peft_layers.Embedding, x, rows, args, kwargs)
        if not (args or kwargs) and type(self) is not peft_layers.Embedding:
            path = embedding_path(self, x)
            if path.name == ADDED:
                return _added(self, x, path)
        return peft_layers.Embedding.forward(self, x, *args, **kwargs)  # by name, as in linear.py

    merge = writes_weight(peft_layers.Embedding.merge)
    unmerge = writes_weight(peft_layers.Embedding.unmerge)

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward is computed, and why."""
        if self.row_adapters is not None and current_row_adapters(self) is not None:
            return mixed_batch.embedding_path(self, current_row_adapters(self))
        path = embedding_path(self, None)
        return path.name, path.reason


def embedding_path(layer: Any, ids: Tensor | None) -> ForwardPath:
    """The path for ids, or for a plain tensor of ids if None."""
    state = adapters_state(layer)
    if state is not None:
        return ForwardPath(*state)
    table = layer._modules["lora_embedding_A"]._parameters
    names = active_names(layer, table)
    if not names:
        return ForwardPath(BASE, "none of the active adapters is in this layer")
    reason = embedding_reason(layer, ids, names)
    variant = None
    if not reason:
        variant, reason = variant_of(EMBEDDING, layer, names)
    if reason:
        return ForwardPath(PEFT, reason)
    updates = [
        Update(name, table[name], layer.lora_embedding_B[name], None, layer.scaling[name], 0.0)
        for name in names
    ]
    what = "" if variant is None else f"{variant.name}: "
    return ForwardPath(ADDED, f"{what}a lookup and a small product by torch", updates, variant)


def _added(layer: Any, ids: Tensor, path: ForwardPath) -> Tensor:
    """The base's own forward, with the updates added."""
    base = layer._modules["base_layer"]
    parts = [
        F.embedding(
            ids,
            update.lora_a.t(),
            base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        for update in path.updates
    ]
    y = base(ids)
    first = path.updates[0]
    if path.variant is not None:
        return path.variant.forward(layer, y, parts[0], first)
    if len(parts) == 1:
        return combine(y, None, None, parts[0], first.lora_b, first.scaling)
    total = y
    for part, update in zip(parts, path.updates, strict=True):
        total = total + (part @ update.lora_b.t()) * update.scaling
    return total.to(y.dtype)
