"""The variants of LoRA that are computed here, by PEFT's class; others use PEFT's forward.

A variant consists of a module with its equations, such as `dora`, and an entry in the tables below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from peft.tuners.lora import variants
from torch import Tensor

from . import dora


class Variant(NamedTuple):
    """Attributes:
    name: for messages.
    reason: (layer, adapter's name) -> why this adapter needs PEFT's forward, or "".
    forward: y of the layer with one adapter. For a linear layer (layer, x, weight, bias, update),
        with any weight that `lora_linear` accepts; for an embedding (layer, y, S, update), with
        the base's output y and S ``[..., r]`` from the lookup in A.
    """

    name: str
    reason: Callable[[Any, str], str]
    forward: Callable[..., Tensor]


Table = Mapping[type, Variant]

LINEAR: Table = {
    variants.DoraLinearVariant: Variant("DoRA", dora.linear_reason, dora.linear),
}
EMBEDDING: Table = {
    variants.DoraEmbeddingVariant: Variant("DoRA", dora.embedding_reason, dora.embedding),
}
# Variants that rows of a batch with different adapters may have: aLoRA computes plain LoRA from its
# invocation tokens on, and nothing before them.
_PLAIN_BY_ROW = getattr(variants, "ALoraLinearVariant", None)


def variant_of(table: Table, layer: Any, names: Sequence[str]) -> tuple[Variant | None, str]:
    """(the variant of a layer's active adapters, None if they are plain; the reason for PEFT's
    forward, or "")."""
    kept, found = layer.lora_variant, None
    for name in names if kept else ():
        if name not in kept:
            continue
        found = table.get(type(kept[name]))
        if found is None:
            known = " or ".join(variant.name for variant in table.values())
            return None, f"a variant of LoRA other than {known}"
    if found is not None and len(names) > 1:
        return found, f"several active adapters, one of them {found.name}"
    return found, "" if found is None else found.reason(layer, names[0])


def row_reason(layer: Any, names: Sequence[str], is_pefts: bool) -> str:
    """Why rows with these adapters need PEFT's forward, or "".

    Args:
        is_pefts: whether they were given as PEFT's adapter_names.
    """
    for name in names if layer.lora_variant else ():
        variant = layer.lora_variant.get(name)
        if variant is not None and (is_pefts or type(variant) is not _PLAIN_BY_ROW):
            return f"{name!r} is DoRA or another variant of LoRA"
    return ""
