"""use_adapters: a model whose samples, or tokens, each have an adapter of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .models.model import lora_layers
from .nn.row_adapters import Left, RowAdapters
from .peft.report import peft_layers

BASE = "__base__"  # PEFT's name for no adapter


@contextmanager
def use_adapters(
    model: nn.Module, names: Sequence[str | None], index: Tensor | None = None
) -> Iterator[nn.Module]:
    """Within the block, every sample of the model's batch has the adapter that it names.

        with lora_ext.use_adapters(model, ["french", None, "french", "code"]):
            loss = model(**batch_of_four).loss
            loss.backward()

    Base layers compute all samples in one product, each adapter its own rows, forward and backward
    (`lora_linear` with an index). An adapter's gradients are those of its own rows; one without
    rows gets none where it was not named, and zeros where it was.

    Args:
        model: with layers of this package, or a model of PEFT after `accelerate`. Its inputs have
            their samples first; `generate`, beam search and a KV cache included.
        names: an adapter for each sample of the batch; None, or PEFT's "__base__", for none. With
            an index: different names that it points to.
        index: int32, ``[batch]`` or ``[batch, tokens]``: places in names, -1 for none. By token,
            steps of one token each take a sample's last (an activated LoRA has -1 before its
            invocation). Under torch.compile another index of the same shape is no other graph;
            other names are.

    Which adapters are active does not matter, nor is it changed. Adapters are trained if their
    parameters require grad (`lora_ext.models.set_adapter` with all names; PEFT's
    ``base_model.set_adapter``). With activation checkpointing, call backward within the block. The
    block is for one batch at a time: threads share the model's layers.

    Yields:
        The model.

    Raises:
        TypeError: names or index are of another kind.
        ValueError: a name is unknown, comes twice beside an index, or its layers cannot do it: PEFT
            layers that are not accelerated, merged adapters; or the model has no LoRA layers.
        IndexError: an index on the CPU is out of range.
    """
    rows = _rows(names, index)
    layers = _layers(model, rows.names)
    before = [(layer, layer.__dict__.get("row_adapters")) for layer in layers]
    for layer in layers:
        layer.row_adapters = rows
    try:
        yield model
    finally:
        for layer, kept in before:
            layer.row_adapters = Left if kept is None else kept


def _rows(names: Sequence[str | None], index: Tensor | None) -> RowAdapters:
    where = "lora_ext.use_adapters: expected"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"{where} a list with a name or None for each sample, but got {names!r}; for one "
            "adapter on all samples, set_adapter it"
        )
    wrong = [name for name in names if name is not None and not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{where} names or None, but got {wrong[0]!r}")
    if index is None:
        if not names:
            raise ValueError(f"{where} a name or None for each sample, but got none")
        distinct = tuple(dict.fromkeys(name for name in names if name not in (None, BASE)))
        places = {name: place for place, name in enumerate(distinct)}
        numbers = [places.get(name or BASE, -1) for name in names]
        return RowAdapters(distinct, torch.tensor(numbers, dtype=torch.int32))
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{where} an index of dtype int32, but got {got}")
    if index.dim() not in (1, 2) or index.numel() == 0:
        raise ValueError(
            f"{where} an index of shape [batch] or [batch, tokens], but got {list(index.shape)}"
        )
    if len(set(names)) != len(names) or None in names or BASE in names:
        raise ValueError(
            f"{where} different names beside an index, in which -1 is no adapter, but got "
            f"{list(names)}"
        )
    if index.is_cpu and not (index.min() >= -1 and index.max() < len(names)):
        raise IndexError(
            f"{where} an index from -1 to {len(names) - 1}, but got {index.min().item()} to "
            f"{index.max().item()}"
        )
    return RowAdapters(tuple(names), index)  # pyright: ignore[reportArgumentType]


def _layers(model: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """All layers with adapters, if each that has one of the names can do it."""
    where = "lora_ext.use_adapters: expected"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where} a model (nn.Module), but got {type(model).__name__}")
    found: list[Any] = []
    known: dict[str, None] = {}
    for path, layer in lora_layers(model):
        known.update(dict.fromkeys(layer.adapters))
        _check_unmerged(path, layer)
        found.append(layer)
    for path, layer in peft_layers(model):
        own: Any = layer
        adapters = [*own.lora_A, *own.lora_embedding_A]
        known.update(dict.fromkeys(adapters))
        if hasattr(type(layer), "row_adapters"):
            _check_unmerged(path, layer)
            found.append(layer)
        elif set(adapters) & set(names):
            raise ValueError(
                f"{where} layers of lora_ext or accelerated ones, but {path!r} is PEFT's "
                f"{type(layer).__name__}; call lora_ext.accelerate(model) first, which knows "
                "linear layers and embeddings"
            )
    if not known:
        raise ValueError(f"{where} a model with adapters, but {type(model).__name__} has none")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{where} names out of {list(known)}, but got {unknown}")
    return found


def _check_unmerged(path: str, layer: Any) -> None:
    if layer.merged_adapters:
        raise ValueError(
            "lora_ext.use_adapters: expected adapters that are not merged, but "
            f"{list(layer.merged_adapters)} are at {path!r}, for all rows; unmerge them first"
        )
