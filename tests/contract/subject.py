"""The two kinds of layer that keep one contract, as tests see them.

A test takes a `Kind` and asks it for a `Subject`: a model with adapters, all of them active and
with random values, and its verbs. Where the kinds rightly differ, the kind says how by an attribute
or a method that has a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from helpers import F32
from torch import Tensor, nn

import lora_ext

# Dropout of the adapters: of all, or by name.
Dropout = float | dict[str, float]


class Kind:
    """One kind of layer.

    Attributes:
        layer_class: of the layers that have adapters.
        layers: names of what `make` makes, some of those in `cases`.
        separate_path: of `lora_ext.explain`, where the active adapters are not one call of the op.
        merged_path: of a merged layer.
        sharded: tolerance of training with FSDP2 beside one process, a share.
    """

    name: str
    layer_class: type
    layers: tuple[str, ...]
    separate_path: str
    merged_path: str
    sharded: float

    def has(self, layer: str, adapters: str) -> bool:
        """Whether the kind has such a layer with such adapters."""
        raise NotImplementedError

    def make(
        self,
        layer: str,
        adapters: str = "one",
        dtype: torch.dtype = F32,
        adapter_dtype: torch.dtype | None = None,
        dropout: Dropout = 0.0,
    ) -> Subject:
        """A model of one layer, or "net", one of several kinds of layer on token ids.

        Two calls make the same values. Adapters are float32 if `adapter_dtype` is None.
        """
        raise NotImplementedError

    def mergeable(self, active: Sequence[str]) -> list[Sequence[str]]:
        """Names that may be merged beside the other active ones without a change of the output."""
        raise NotImplementedError

    def has_blocks(self, layer: str, adapters: str) -> bool:
        """Whether the layer sums in blocks of rows, whose bits a graph without blocks has not."""
        raise NotImplementedError

    def unmerged(self, dtype: torch.dtype) -> dict[str, float]:
        """Tolerances for what is computed after unmerging."""
        raise NotImplementedError


class Subject:
    """A model with adapters, and the verbs of its kind."""

    def __init__(self, kind: Kind, name: str, model: nn.Module) -> None:
        self.kind, self.name, self.model = kind, name, model
        self.dtype = F32  # of the base

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    @property
    def layers(self) -> list[Any]:
        """The layers that have adapters."""
        return [m for m in self.model.modules() if isinstance(m, self.kind.layer_class)]

    @property
    def layer(self) -> Any:
        """The only one."""
        (layer,) = self.layers
        return layer

    def holding(self, model: nn.Module) -> Subject:
        """The same of another model, such as a copy."""
        return type(self)(self.kind, self.name, model)

    def paths(self) -> set[str]:
        """Of `lora_ext.explain`."""
        return {layer.path for layer in lora_ext.explain(self.model)}

    def reasons(self) -> set[tuple[str, str]]:
        return {(layer.path, layer.reason) for layer in lora_ext.explain(self.model)}

    def x(self, rows: int = 60, dtype: torch.dtype = F32) -> Tensor:
        """What the model takes: `rows` rows where that can be chosen, or ids."""
        raise NotImplementedError

    def factors(self, name: str) -> list[nn.Parameter]:
        """What is trained of one adapter: A, B, then what else there is."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """What is trained of all adapters."""
        raise NotImplementedError

    def active(self) -> set[tuple[str, ...]]:
        """The active adapters of each layer."""
        return {tuple(layer.active_adapters) for layer in self.layers}

    def merged(self) -> set[tuple[str, ...]]:
        """The merged adapters of each layer."""
        return {tuple(layer.merged_adapters) for layer in self.layers}

    def delta(self, name: str) -> Tensor:
        """scaling * B A of the only layer, laid out as its weight."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The only layer's weight, with what is merged."""
        raise NotImplementedError

    def set_adapter(self, names: str | Iterable[str]) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def merge(self, names: Sequence[str] | None = None) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def pack(self) -> None:
        """Keeps what speeds the forward up beside the parameters, where the kind has such."""

    def save(self, folder: Path, name: str) -> None:
        """One adapter, in PEFT's format."""
        raise NotImplementedError

    def load(self, folder: Path, name: str) -> None:
        """What `save` wrote into the same folder, as another adapter."""
        raise NotImplementedError

    def disabled(self) -> AbstractContextManager:
        raise NotImplementedError

    def in_float64(self) -> nn.Module:
        """A copy that computes in float64, without dropout, by formulas that are none of ours."""
        raise NotImplementedError

    def in_peft_order(self) -> nn.Module:
        """A copy that computes by PEFT's operations in the same dtypes, without dropout."""
        raise NotImplementedError
