"""Adapters on parameters in PEFT's files: which parameters, with which keys, in which order.

PEFT wraps a module once for each parameter that target_parameters names, in the module's order,
and a key has a ``base_layer`` for each wrapper around its own:

    <path>.base_layer.lora_A.weight     of gate_up_proj, the inner
    <path>.lora_A.weight                of down_proj, the outer

The factors of a stack are those of `LoRAParameter`, lora_A ``[E r, in]``, lora_B ``[out, r E]``.

Before 0.19.1 PEFT interpreted the parameter's dimension 1 as `in`, also where it is `out`, and
0.19.0 swapped the two also where it is `in`: then B_e^T is stored as A, and A_e^T as B. Unsloth's
first versions used the columns e r to (e + 1) r of lora_B for B_e; its later versions state this in
lora_B_layout.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..experts.factors import a_by_expert, b_by_expert
from ..nn import LoRALayer, LoRAModule
from ..nn.parameter import LoRAParameter
from ..quantized.stacks import parameter_names
from .errors import AdapterError, shown, some
from .layout import WRAPPED, slots
from .peft_config import AdapterConfig
from .targets import named
from .tensors import Entry

# The first version that interprets `in` correctly in both layouts of a stack.
_FIXED = (0, 19, 1)


def without_wrappers(path: str) -> tuple[str, int]:
    """(the module's path, the number of wrappers around it) from the path in a key."""
    end = len(path)
    while path.endswith(WRAPPED, 0, end):  # a stranger's path may repeat it for very long
        end -= len(WRAPPED)
    return path[:end], (len(path) - end) // len(WRAPPED)


def named_parameters(path: str, module: nn.Module, targets: Iterable[str]) -> list[str]:
    """The module's own parameters that target_parameters names, the innermost first."""
    found = named([f"{path}.{name}" for name in parameter_names(module)], targets)
    return [name.rpartition(".")[2] for name in found]


def stacked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(lora_A ``[E r, in]``, lora_B ``[out, r E]``) of A ``[E, r, in]`` and B ``[E, out, r]``."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True)
class FactorOrder:
    """The layout in which a file stores the factors of one parameter: E, 1 for a matrix; whether
    B^T is stored as A, and A^T as B; whether the columns of lora_B are grouped by expert."""

    count: int
    is_swapped: bool = False
    is_grouped: bool = False

    def ours(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """The file's tensors in the layout of a `LoRAParameter`."""
        if self.is_grouped:
            lora_b = lora_b.unflatten(1, (self.count, -1)).transpose(1, 2).flatten(1)
        if not self.is_swapped:
            return lora_a, lora_b
        return stacked(b_by_expert(lora_b, self.count).mT, a_by_expert(lora_a, self.count).mT)


def order_of(layer: LoRALayer, entry: Entry | None, config: AdapterConfig) -> FactorOrder:
    """The layout of factors in a file, of which `entry` is lora_A; warns if the file does not
    determine it."""
    if not isinstance(layer, LoRAParameter) or len(layer.weight_shape) == 2:
        return FactorOrder(1)
    out_features, in_features = layer.matrix_shape
    width = entry.shape[1] if entry and len(entry.shape) == 2 else in_features
    is_swapped = width == out_features
    if in_features == out_features:
        is_swapped = _is_swapped_by_version(config.peft_version, layer.transposed)
    is_grouped = config.lora_b_layout == "grouped_by_expert"
    return FactorOrder(layer.count, is_swapped, is_grouped)


def _is_swapped_by_version(version: str | None, transposed: bool) -> bool:
    """Whether factors of square matrices are swapped, which their shapes cannot show."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    numbers = tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    is_known = found is not None and ("dev" not in str(version) or numbers > _FIXED)
    if not is_known:
        warnings.warn(
            f"lora_ext.load_adapter: peft_version {shown(version)} does not say which of the "
            "two matrices of square experts is lora_A; they are read as by PEFT "
            f"{'0.17' if found is None else '.'.join(map(str, numbers))}. If another wrote them, "
            "put its version into adapter_config.json: 0.21.2 for lora_ext",
            stacklevel=2,
        )
    if numbers >= _FIXED:
        return False
    return numbers >= (0, 19, 0) or not transposed


def warn_of_unsloth(config: AdapterConfig, targets: Iterable[tuple[LoRALayer, int]]) -> None:
    """Warns of a file from Unsloth that does not state the layout of lora_B, for the layers that
    get the adapter, each with its rank."""
    unclear = any(
        isinstance(layer, LoRAParameter) and layer.count > 1 and r > 1 for layer, r in targets
    )
    if config.is_of_unsloth and config.lora_b_layout is None and unclear:
        warnings.warn(
            "lora_ext.load_adapter: the folder is Unsloth's and adapter_config.json has no "
            "lora_B_layout, so lora_B of the experts is read as PEFT reads it, 'rank_major'. "
            "unsloth_zoo before September 2026 trained it in another order, with which this is "
            'noise: if it did, add "lora_B_layout": "grouped_by_expert"',
            stacklevel=2,
        )


def check_wrappers(path: str, names: list[str], depth: int, config: AdapterConfig) -> None:
    """Raises AdapterError if the keys of a module are not those of the named parameters."""
    if depth + 1 != len(names):
        raise AdapterError(
            f"expected lora_A and lora_B for each of {names} of {path!r}, which "
            f"target_parameters {shown(list(config.target_parameters))} names, but the file has "
            f"{depth + 1} (one, and one for each 'base_layer' in a key)"
        )


def layers_of(
    path: str, names: list[str], around: LoRAModule, entries: Mapping[str, Entry]
) -> list[LoRAParameter]:
    """The layers of a module's parameters, that of the innermost wrapper first.

    PEFT wraps the parameters of quantised experts by the alphabet, of others in the module's order,
    and a file of the ones may be loaded into the others: the factors' sizes say what they are of.
    AdapterError if a parameter, of these in the order of the module's wrappers, cannot have one.
    """
    own = {layer.parameter: layer for layer in around.layers()}
    for name in names:
        if name not in own:
            raise AdapterError(
                f"expected target_parameters to name weights, which are {some(own)} of {path!r}, "
                f"but it names {name!r}"
            )
    layers = [own[name] for name in names]

    def fits(order: list[LoRAParameter]) -> bool:
        """Whether factors in the file have the sizes of these parameters', swapped or not."""
        for depth, layer in enumerate(reversed(order)):
            pair = [entries.get(slot.key) for slot in slots(path, layer, 0, depth=depth)]
            sizes = [e.shape[1 - i] for i, e in enumerate(pair) if e and len(e.shape) == 2]
            if len(sizes) < 2 or set(sizes) != set(layer.matrix_shape):
                return False
        return True

    return layers[::-1] if not fits(layers) and fits(layers[::-1]) else layers
