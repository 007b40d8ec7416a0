"""The two kinds of layer that keep one contract, as tests see them.

A test takes a `Kind` and asks it for a `Subject`: a model with adapters, all of them active and
with random values, and its verbs. Where the kinds rightly differ, the kind says how by an attribute
or a method that has a name.
"""

from __future__ import annotations

from typing import Any

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
        merged_path: of a merged layer.
        sharded: tolerance of training with FSDP2 beside one process, a share.

    Methods:
        has(layer, adapters): whether the kind has such a layer with such adapters.
        make(layer, adapters, dtype, adapter_dtype, dropout): a Subject of one layer, or of "net",
            several kinds of layer on token ids. Two calls make the same values; adapters are
            float32 if `adapter_dtype` is None.
        mergeable(active): names that may be merged beside the other active ones without a change of
            the output.
        has_blocks(layer, adapters): whether the layer sums in blocks of rows, whose bits a graph
            without blocks has not.
        unmerged(dtype): tolerances for what is computed after unmerging.
    """

    name: str
    layer_class: type
    layers: tuple[str, ...]
    merged_path: str
    sharded: float


class Subject:
    """A model with adapters, and the verbs of its kind.

    Methods of each kind:
        x(rows, dtype): what the model takes, `rows` rows where that can be chosen, or ids.
        factors(name): what is trained of one adapter: A, B, then what else there is.
        trained(): what is trained of all adapters.
        delta(name): scaling * B A of the only layer, laid out as its weight.
        weight(): the only layer's weight, with what is merged.
        set_adapter(names), delete(name), merge(names), unmerge(), disabled(): its verbs.
        save(folder, name): one adapter, in PEFT's format.
        load(folder, name): what `save` wrote into the same folder, as another adapter.
        in_float64(): a copy that computes in float64, without dropout, by formulas that are none of
            ours.
        in_peft_order(): a copy that computes by PEFT's operations in the same dtypes, without
            dropout.
    """

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

    def active(self) -> set[tuple[str, ...]]:
        """The active adapters of each layer."""
        return {tuple(layer.active_adapters) for layer in self.layers}

    def merged(self) -> set[tuple[str, ...]]:
        """The merged adapters of each layer."""
        return {tuple(layer.merged_adapters) for layer in self.layers}

    def pack(self) -> None:
        """Keeps what speeds the forward up beside the parameters, where the kind has such."""
