"""PEFT's embedding layers: a lookup in A, and a small product added onto the base's output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layers
from torch import Tensor

from ..call import Call, Decision, Path
from ..call.apply import Update, mixed_lookup
from ..call.decision import by_row, example
from ..packed_weight import writes_weight
from ..rows.row_adapters import RowAdapters
from .layer import Accelerated, by_peft, forward_over, names_of, settled
from .reasons import embedding_reason
from .row_blocks import combine
from .variants import EMBEDDING, Variant, variant_of


class Embedding(Accelerated, peft_layers.Embedding):
    """`peft.tuners.lora.Embedding` with another forward and nothing else.

        y = base(ids) + sum over active adapters of scaling * A[:, ids]^T B^T
        y = g * (base(ids) + scaling * A[:, ids]^T B^T)                       for DoRA (`dora`)

    Shape:
        ids ``[...]`` to y ``[..., embedding_dim]`` in the base weight's dtype.
    """

    forward = forward_over(peft_layers.Embedding)

    merge = writes_weight(peft_layers.Embedding.merge)
    unmerge = writes_weight(peft_layers.Embedding.unmerge)

    def decide(self: Any, call: Call) -> Decision:
        rows, table = call.rows, self.lora_embedding_A
        names = names_of(self, table._parameters, rows)
        found = settled(self, call, names)
        if found is not None:
            return found
        reason, variant = embedding_reason(self, call.x, names), None
        if rows is None and not reason:
            variant, reason = variant_of(EMBEDDING, self, names)
        if reason:
            return by_peft(self, call, reason)
        other, scaling = self.lora_embedding_B, self.scaling
        updates = [Update(n, table[n], other[n], None, scaling[n], 0.0) for n in names]
        what = "" if variant is None else f"{variant.name}: "
        what = by_row(call, names, f"{what}a lookup and a small product by torch")
        run = partial(_added, self, updates=updates, variant=variant, rows=rows)
        return Decision(run, Path.ADDED, what)

    def example(self: Any, rows: int | None, block: RowAdapters | None) -> Tensor:
        return example(self, torch.int64, rows, block)


def _added(
    layer: Any,
    ids: Tensor,
    updates: Sequence[Update],
    variant: Variant | None,
    rows: RowAdapters | None,
) -> Tensor:
    """The base's own forward, with the updates added."""
    base = layer._modules["base_layer"]

    def look_up(columns: Tensor) -> Tensor:
        by_count = base.scale_grad_by_freq
        return F.embedding(ids, columns, base.padding_idx, scale_grad_by_freq=by_count)

    if variant is None and (rows is not None or len(updates) > 1):
        return mixed_lookup(base(ids), ids, updates, rows, look_up)
    y, first = base(ids), updates[0]
    part = look_up(first.lora_a.t())
    if variant is not None:
        return variant.forward(layer, y, part, first)
    return combine(y, None, None, part, first.lora_b, first.scaling)
