"""Names and shapes of one adapted module's tensors in PEFT's file."""

from __future__ import annotations

from dataclasses import dataclass

from ..nn import LoRAConv2d, LoRAEmbedding, LoRALayer
from ..nn.adapter_spec import AdapterSpec

PREFIX = "base_model.model."
_ENDS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
)


@dataclass(frozen=True)
class Slot:
    """The place of one tensor of an adapter, in the file and in the layer.

    Attributes:
        key: its name in the file.
        table: "lora_a", "lora_b" or "lora_bias": the layer's attribute.
        shape: its shape in the file; in the layer it has the first two dimensions only.
    """

    key: str
    table: str
    shape: tuple[int, ...]


def path_of_factor(key: str) -> str | None:
    """The path of the module that a tensor of the file adapts; None if it is not a factor."""
    for end in _ENDS:
        if key.startswith(PREFIX) and key.endswith(end):
            return key[len(PREFIX) : -len(end)]
    return None


def features(layer: LoRALayer) -> tuple[int, int]:
    """(in, out) of the update; an embedding looks up one of `in` rows."""
    out_features, in_features = layer.matrix_shape
    return in_features, out_features


def slots(path: str, layer: LoRALayer, rank: int, lora_bias: bool) -> list[Slot]:
    """The tensors that PEFT stores for a module with an adapter.

    Linear layers and Conv1D have lora_A.weight ``[r, in]`` and lora_B.weight ``[out, r]``, 1x1
    convolutions the same with two more dimensions of size 1. Embeddings have lora_embedding_A
    ``[r, in]`` and lora_embedding_B ``[out, r]``.
    """
    in_features, out_features = features(layer)
    start = f"{PREFIX}{path}."
    if isinstance(layer, LoRAEmbedding):
        keys = ("lora_embedding_A", "lora_embedding_B")
    else:
        keys = ("lora_A.weight", "lora_B.weight")
    ones = (1, 1) if isinstance(layer, LoRAConv2d) else ()
    found = [
        Slot(start + keys[0], "lora_a", (rank, in_features, *ones)),
        Slot(start + keys[1], "lora_b", (out_features, rank, *ones)),
    ]
    if lora_bias:
        found.append(Slot(start + "lora_B.bias", "lora_bias", (out_features,)))
    return found


def bias_key(path: str, is_adapted: bool) -> str:
    """The name of a base's bias."""
    inside = f"{path}." if path else ""
    return f"{PREFIX}{inside}{'base_layer.' if is_adapted else ''}bias"


def plain_spec(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """The spec of a plain LoRA of this rank with the same scaling."""
    if rank == spec.r and not spec.subtracts_init:
        return spec
    alpha = spec.alpha * (rank / spec.r) ** (0.5 if spec.use_rslora else 1)
    return AdapterSpec(rank, alpha, spec.dropout, spec.use_rslora, lora_bias=spec.lora_bias)
