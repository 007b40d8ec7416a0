"""Names and shapes of the tensors in PEFT's file: the factors of modules and parameters, and
tensors of the base beside them; which module holds these, and whether they can be written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ..models.model import named_modules
from ..nn import LoRAConv2d, LoRAEmbedding, LoRALayer
from ..nn.parameter import LoRAParameter
from ..torch_state import is_sharded
from .errors import AdapterError

PREFIX = "base_model.model."
WRAPPED = ".base_layer"
_KIND = r"(?:([AB])\.weight|B\.bias|embedding_[AB])"
# The path of the module that a factor is for; "A" or "B" of one that is a matrix of a linear layer.
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_{_KIND}", re.DOTALL)


class Slot(NamedTuple):
    """The place of one tensor of an adapter: its name in the file; "lora_a", "lora_b" or
    "lora_bias", the layer's attribute; its shape in the file, of which the layer has the first two
    dimensions."""

    key: str
    table: str
    shape: tuple[int, ...]


def path_of_factor(key: str) -> str | None:
    """The path of the module that a tensor of the file adapts; None if it is not a factor."""
    found = FACTOR.fullmatch(key)
    return found and found[1]


def slots(
    path: str,
    layer: LoRALayer,
    rank: int,
    lora_bias: bool = False,
    depth: int = 0,
    is_swapped: bool = False,
) -> list[Slot]:
    """The tensors that PEFT stores for a module with an adapter, or for one of its parameters.

    Linear layers, Conv1D and matrices have lora_A.weight ``[r, in]`` and lora_B.weight ``[out,
    r]``, 1x1 convolutions the same with two more dimensions of size 1, stacks ``[E r, in]`` and
    ``[out, r E]``. Embeddings have lora_embedding_A ``[r, in]`` and lora_embedding_B ``[out, r]``.

    Args:
        path: of the module.
        depth: number of wrappers around that of the parameter (`parameters.py`).
        is_swapped: whether `in` and `out` are.
    """
    out_features, in_features = layer.matrix_shape[:: -1 if is_swapped else 1]
    start = f"{PREFIX}{path}{WRAPPED * depth}."
    is_embedding = isinstance(layer, LoRAEmbedding)
    end = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
    ones = (1, 1) if isinstance(layer, LoRAConv2d) else ()
    ranks = rank * layer.count if isinstance(layer, LoRAParameter) else rank
    found = [
        Slot(start + end.format("A"), "lora_a", (ranks, in_features, *ones)),
        Slot(start + end.format("B"), "lora_b", (out_features, ranks, *ones)),
    ]
    if lora_bias and not isinstance(layer, LoRAParameter):
        found.append(Slot(start + "lora_B.bias", "lora_bias", (out_features,)))
    return found


@dataclass
class Stored:
    """A tensor of the base in the file.

    Attributes:
        key: its name in the file.
        tensor: of the model.
        holder: the module that it is a parameter or buffer of.
        is_copied: whether PEFT copies the holder, so that modules tied to it do not change.
        written: False if the tensor is optional in the file and must have the model's values.
        value: the value to write, after it is read.
        untied: whether the holder gets a separate parameter instead.
    """

    key: str
    tensor: Tensor
    holder: nn.Module
    is_copied: bool = False
    written: bool = True
    value: Tensor | None = None
    untied: bool = False

    @property
    def name(self) -> str:
        """Its name in the holder."""
        return self.key.rpartition(".")[2]


def stored_tensors(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    bias: str,
    adapted: set[str],
    saved: Mapping[str, nn.Module],
) -> Iterator[Stored]:
    """What an adapter stores of its base: biases of the modules, at each of their paths, all or
    those of `adapted` paths alone, and the modules that are saved whole."""
    for path, module in {"": model, **modules}.items():
        own = bias_of(module)
        if own is not None and (bias == "all" or (bias == "lora_only" and path in adapted)):
            inside = f"{path}{WRAPPED if path in adapted else ''}." if path else ""
            yield Stored(f"{PREFIX}{inside}bias", own, module)
    for path, root in saved.items():
        holders = dict(named_modules(root, remove_duplicate=False))
        for name, tensor in root.state_dict(keep_vars=True).items():
            holder = holders[name.rpartition(".")[0]]
            yield Stored(f"{PREFIX}{path}.{name}", tensor, holder, is_copied=True)


# ---- of a model ----


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inside = model._modules.get("_orig_mod")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def check_real(what: str, tensor: Tensor) -> None:
    """Raises AdapterError for a tensor that cannot be written as a whole."""
    if tensor.is_meta or is_sharded(tensor):
        state = "on the meta device" if tensor.is_meta else "sharded"
        raise AdapterError(
            f"expected {what} to be a whole tensor with values, but it is {state}; load adapters "
            "after the weights and before sharding"
        )


def bias_of(module: nn.Module) -> Tensor | None:
    """The tensor that ``module.state_dict()`` has as "bias"."""
    if "bias" in module._non_persistent_buffers_set:
        return None
    return dict(tensors_of(module)).get("bias")


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the parameters and buffers that the module itself holds."""
    for table in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in table.items() if tensor is not None)
