"""Which adapter each row of a batch has, and the call of the op that this makes of a layer.

    y[m] = x[m] W^T + bias + scaling[g] * ((drop(x)[m] A_g^T) B_g^T + bias_g)       g of row m

Whoever holds the adapters, a layer of this package or one of PEFT, gives one `Update` for each name
of a `RowAdapters`, or None where the layer has no such adapter: its rows have the base alone there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import HALVES
from ..functional import lora_linear, lora_update
from .slots import PoolCall
from .updates import Update, compute_dtype, is_autocast, is_onnx_export, is_traced

NO_ADAPTER = -1


class RowAdapters:
    """Names of adapters, and an index into them for each sample or token of a batch.

    Attributes:
        names: different names.
        index: int32, ``[batch]`` or ``[batch, tokens]``, from -1 (no adapter) to len(names) - 1.

    What the layers ask for is made once for each shape and device and shared by all of them. Under
    a trace it is made of tensors alone, so that another index needs no other graph.
    """

    def __init__(self, names: tuple[str, ...], index: Tensor) -> None:
        self.names, self.index = names, index
        self._made: dict[Any, Tensor] = {}

    def rows_of(self, x: Tensor) -> Tensor:
        """The adapter of each row of x ``[..., in]``, int32 of its shape without the last.

        Samples come first in x. It may hold each of them several times in a row, as in beam search,
        or have further dimensions within a sample (tokens, pixels). By token, an x of one token for
        each sample takes the last of the index: a step of `generate` with a KV cache.

        Raises:
            RuntimeError: x has no such rows.
        """
        lead = tuple(x.shape[:-1])
        if is_traced():
            return self._rows(lead, x.device)
        key = (lead, x.device)
        if key not in self._made:
            self._made[key] = self._rows(lead, x.device)
        return self._made[key]

    def _rows(self, lead: tuple[int, ...], device: torch.device) -> Tensor:
        index = self.index.to(device)
        rows, batch = 1, index.shape[0]
        for size in lead:
            rows = rows * size
        if index.dim() == 2 and (len(lead) != 1 or rows % index.numel()):
            tokens = 1 if len(lead) == 1 else lead[1]
            if tokens == 1:
                index = index[:, -1]
            elif tokens != index.shape[1]:
                raise self._unfit(lead)
        if batch == 0 or rows % index.numel() or (len(lead) > 1 and lead[0] % batch):
            raise self._unfit(lead)
        if index.dim() == 2:
            return index.repeat_interleave(rows // index.numel(), 0).reshape(lead)
        return index.repeat_interleave(rows // batch).reshape(lead)

    def _unfit(self, lead: tuple[int, ...]) -> RuntimeError:
        return RuntimeError(
            "lora_ext.use_adapters: expected an x whose samples come first, for an index of shape "
            f"{list(self.index.shape)}, but got one of shape {[*lead, 'in_features']}; give an "
            "index [batch] or [batch, tokens] of the batch that the model is called with"
        )

    def rows_for(self, x: Tensor, updates: Sequence[Update | None]) -> Tensor:
        """`rows_of` x, with no adapter where the layer has none of that name."""
        rows = self.rows_of(x)
        if None not in updates:
            return rows
        places = [NO_ADAPTER if update is None else g for g, update in enumerate(updates)]
        return self.looked_up(places, rows)

    def looked_up(self, places: list[int], rows: Tensor) -> Tensor:
        """places[adapter] of each row, -1 of none."""
        key = (tuple(places), rows.shape, rows.device)
        if is_traced() or key not in self._made:
            # -1 looks up the last.
            table = torch.tensor([*places, NO_ADAPTER], dtype=torch.int32, device=rows.device)
            found = table[rows.long()]
            if is_traced():
                return found
            self._made[key] = found
        return self._made[key]

    def scaling_of(self, updates: Sequence[Update], device: torch.device) -> Tensor:
        """float32 ``[len(updates)]``."""
        scalings = [update.scaling for update in updates]
        if any(isinstance(scaling, Tensor) for scaling in scalings):
            return torch.stack(
                [torch.as_tensor(s, device=device).float().reshape(()) for s in scalings]
            )
        key = ("scaling", tuple(scalings), device)
        if is_traced() or key not in self._made:
            made = torch.tensor(scalings, dtype=torch.float32, device=device)
            if is_traced():
                return made
            self._made[key] = made
        return self._made[key]


class Left:
    """In the place of a layer's `RowAdapters` after the block: what it was is over.

    A checkpoint that computes a forward again in its backward, outside of the block, would take the
    active adapters instead. A class, so that copies and pickles of a layer have the same.
    """


def rows_in_use(layer: Any) -> RowAdapters | None:
    """What a layer's forward has to go by.

    Raises:
        RuntimeError: a checkpoint computes the layer again after the block has ended.
    """
    rows = layer.__dict__.get("row_adapters")
    if rows is not Left:
        return rows
    if not is_traced():
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "lora_ext.use_adapters: expected the backward of a checkpoint, which computes the "
                "forward again, within the block of its forward, but the block has ended; call "
                "backward() inside `with lora_ext.use_adapters(...)`"
            )
        del layer.row_adapters
    return None


def check_rows_can_be_told(layer: Any, x: Tensor) -> None:
    """Raises where an adapter for each row cannot be what the caller wants.

    Raises:
        RuntimeError: adapters are merged into the weight, which is that of all rows.
        NotImplementedError: x is nested, or torch.onnx.export is tracing.
    """
    if layer.merged_adapters:
        raise RuntimeError(
            "lora_ext.use_adapters: expected adapters that are not merged, but "
            f"{list(layer.merged_adapters)} are, for all rows; unmerge them first"
        )
    if x.is_nested or is_onnx_export():
        what = "a nested x" if x.is_nested else "an export to ONNX"
        raise NotImplementedError(
            f"lora_ext.use_adapters: expected a dense x and no export to ONNX, but got {what}"
        )


def linear_by_rows(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    updates: Sequence[Update | None],
    rows: RowAdapters,
) -> Tensor:
    """A frozen linear layer with an adapter for each row.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]`` or a `PackedWeight` of it; bias: ``[out]`` or None.
        updates: one for each of rows.names.
    """
    index = rows.rows_for(x, updates)
    calls = _calls(updates, index, rows, x)
    if not calls:
        return F.linear(x, getattr(weight, "weight", weight), bias)
    first = calls[0]
    factors = (first.lora_a, first.lora_b)
    y = lora_linear(x, weight, *factors, bias, first.scaling, first.dropout, index=first.rows)
    return _with_biases(_added(y, x, calls[1:]), updates, index)


def linear_by_pool(
    x: Tensor, weight: Any, bias: Tensor | None, call: PoolCall, rows: RowAdapters
) -> Tensor:
    """The same of adapters that are all in a pool, in evaluation: no list of them is made."""
    index = rows.looked_up(list(call.slots), rows.rows_of(x))
    factors = (call.lora_a, call.lora_b)
    return lora_linear(x, weight, *factors, bias, call.scaling, index=index, ranks=call.ranks)


def op_takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether factors of a dtype are the op's for x as they are."""
    compute = compute_dtype(x)
    return dtype == compute or (dtype == torch.float32 and compute in HALVES)


def added_by_rows(
    y: Tensor, x: Tensor, updates: Sequence[Update | None], rows: RowAdapters
) -> Tensor:
    """What any base returned for x, with an adapter for each row: a new tensor in y's dtype."""
    index = rows.rows_for(x, updates)
    return _with_biases(_added(y, x, _calls(updates, index, rows, x)), updates, index)


class _Call(NamedTuple):
    """What one call of the op takes."""

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    rows: Tensor  # the index
    scaling: float | Tensor
    dropout: float


def _calls(
    updates: Sequence[Update | None], index: Tensor, rows: RowAdapters, x: Tensor
) -> list[_Call]:
    """Adapters of one dropout and dtype are one call; the rows of others have no adapter there."""
    kinds: dict[tuple, list[int]] = {}
    for g, update in enumerate(updates):
        if update is not None:
            kinds.setdefault((update.dropout, update.lora_a.dtype), []).append(g)
    calls = []
    for (dropout, dtype), members in kinds.items():
        own = [update for g in members if (update := updates[g]) is not None]
        lora_a, lora_b = [u.lora_a for u in own], [u.lora_b for u in own]
        if dtype in HALVES and dtype != compute_dtype(x):  # the op would refuse them
            lora_a, lora_b = [a.float() for a in lora_a], [b.float() for b in lora_b]
        scaling: float | Tensor = rows.scaling_of(own, x.device)
        if dtype == torch.float64:  # the op has many scalings in float32
            lora_b = [b * u.scaling for b, u in zip(lora_b, own, strict=True)]
            scaling = 1.0
        if len(members) != len(updates):
            places = [NO_ADAPTER] * len(updates)
            for place, g in enumerate(members):
                places[g] = place
            mine = rows.looked_up(places, rows.rows_of(x))
        else:
            mine = index
        calls.append(_Call(lora_a, lora_b, mine, scaling, dropout))
    return calls


def _added(y: Tensor, x: Tensor, calls: Sequence[_Call]) -> Tensor:
    for lora_a, lora_b, own_rows, scaling, dropout in calls:
        dtype = lora_a[0].dtype
        wide_beside_half = x.dtype in HALVES and dtype == torch.float32
        own = x if wide_beside_half or is_autocast(x) else x.to(dtype)
        y = lora_update(y, own, lora_a, lora_b, scaling, dropout, index=own_rows)
    return y


def _with_biases(y: Tensor, updates: Sequence[Update | None], index: Tensor) -> Tensor:
    """y with scaling * lora_bias of each row's adapter, summed in at least float32."""
    if all(update is None or update.bias is None for update in updates):
        return y
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    zeros = y.new_zeros(y.shape[-1], dtype=wide)
    table = [
        zeros if u is None or u.bias is None else u.bias.to(y.device, wide) * u.scaling
        for u in updates
    ]
    biases = torch.stack([*table, zeros])[index.long()]  # -1 is the last
    return (y + biases).to(y.dtype)
