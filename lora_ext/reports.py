"""What a model does and trains, for print()."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .model import adapter_names, lora_layers


@dataclass(frozen=True)
class LayerPath:
    """How one layer computes its next forward.

    Attributes:
        name: dotted path of the layer in the model.
        kind: its class.
        path: "fused" (our kernels), "packed" (with a packed weight), "library" (torch's products),
            "merged" (one product with the merged weight) or "base" (no update).
        reason: why.
    """

    name: str
    kind: str
    path: str
    reason: str


class Explanation(list[LayerPath]):
    """A list of `LayerPath`; str() is a table, with equal layers counted on one line."""

    def __str__(self) -> str:
        if not self:
            return "no layer has adapters; see lora_ext.apply_lora"
        lines: dict[tuple[str, str, str, str], list[str]] = {}
        for layer in self:
            short = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            key = (short or "(itself)", layer.kind, layer.path, layer.reason)
            lines.setdefault(key, []).append(layer.name)
        rows = [("layer", "count", "class", "path", "reason")]
        rows += [(k[0], str(len(names)), *k[1:]) for k, names in lines.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        )


def explain(model: nn.Module, rows: int | None = None) -> Explanation:
    """Says for each layer with adapters how its next forward is computed, and why so.

    Args:
        model: a model, or one layer.
        rows: rows of x (batch times sequence), which choose the kernel; None for many.
    """
    return Explanation(
        LayerPath(name, type(layer).__name__, *layer.path(rows))
        for name, layer in lora_layers(model)
    )


@dataclass(frozen=True)
class TrainableParameters:
    """Counts of parameters; str() is a sentence.

    Attributes:
        trainable, total: of the whole model, adapters included, shared ones once.
        adapters: name -> number of elements, active or not.
        adapter_bytes: name -> bytes, as saved.
    """

    trainable: int
    total: int
    adapters: dict[str, int]
    adapter_bytes: dict[str, int]

    @property
    def percent(self) -> float:
        """100 trainable / total."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        adapters = "; ".join(
            f"adapter {name!r}: {count:,} ({self.adapter_bytes[name] / 2**20:.2f} MiB)"
            for name, count in self.adapters.items()
        )
        return (
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f}%); "
            f"{adapters or 'no adapters'}"
        )


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """How many parameters are trained, how many there are, and how large each adapter is."""
    parameters = list(model.parameters())
    counts, sizes = dict.fromkeys(adapter_names(model), 0), dict.fromkeys(adapter_names(model), 0)
    for _, layer in lora_layers(model):
        for table in layer.tables().values():
            for name, parameter in table.items():
                counts[name] += parameter.numel()
                sizes[name] += parameter.numel() * parameter.element_size()
    return TrainableParameters(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        adapters=counts,
        adapter_bytes=sizes,
    )
