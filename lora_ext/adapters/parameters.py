"""Adapters on parameters in PEFT's files: which parameters, with which keys, in which order.

PEFT wraps a module once for each parameter that target_parameters names, in the module's order,
and a key has a ``base_layer`` for each wrapper around its own:

    <path>.base_layer.lora_A.weight     of gate_up_proj, the inner
    <path>.lora_A.weight                of down_proj, the outer

The factors of a stack of E matrices W_e ``[out, in]`` are

    lora_A  [E r, in]      A_e = rows e r to (e + 1) r
    lora_B  [out, r E]     B_e = columns e, e + E, e + 2 E, ...

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

from ..nn.parameter import LoRAParameter
from ..quantized.stacks import parameter_names
from .errors import AdapterError, shown, some
from .layout import PREFIX, Slot
from .peft_config import AdapterConfig
from .tensors import Entry

_INNER = ".base_layer"
# The first version that interprets `in` correctly in both layouts of a stack.
_FIXED = (0, 19, 1)


def without_wrappers(path: str) -> tuple[str, int]:
    """(the module's path, the number of wrappers around it) from the path in a key."""
    end = len(path)
    while path.endswith(_INNER, 0, end):  # a stranger's path may repeat it for very long
        end -= len(_INNER)
    return path[:end], (len(path) - end) // len(_INNER)


def is_named(name: str, targets: Iterable[str]) -> bool:
    """Whether target_parameters names this parameter, by PEFT's rule."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def named_parameters(path: str, module: nn.Module, targets: Iterable[str]) -> list[str]:
    """The module's own parameters that target_parameters names, the innermost first."""
    own = parameter_names(module)
    return [name for name in own if is_named(f"{path}.{name}", targets)]


@dataclass(frozen=True)
class FactorOrder:
    """The layout in which a file stores the factors of one parameter.

    Attributes:
        count: E, 1 for a matrix.
        is_swapped: whether B^T is stored as A, and A^T as B.
        is_grouped: whether the columns of lora_B are grouped by expert.
    """

    count: int
    is_swapped: bool = False
    is_grouped: bool = False

    def shapes(self, r: int, features: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_A and lora_B in the file, for (in, out) features."""
        first, second = reversed(features) if self.is_swapped else features
        return (self.count * r, first), (second, r * self.count)

    def ours(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """The file's tensors in the layout of a `LoRAParameter`."""
        count = self.count
        if self.is_grouped:
            lora_b = lora_b.view(len(lora_b), count, -1).transpose(1, 2).reshape(lora_b.shape)
        if not self.is_swapped:
            return lora_a, lora_b
        of_b = lora_a.view(count, -1, lora_a.shape[1]).permute(2, 1, 0)  # [out, r, E]
        of_a = lora_b.view(len(lora_b), -1, count).permute(2, 1, 0)  # [E, r, in]
        return of_a.reshape(-1, len(lora_b)), of_b.reshape(lora_a.shape[1], -1)


def order_of(layer: LoRAParameter, entry: Entry | None, config: AdapterConfig) -> FactorOrder:
    """The layout of a parameter's factors in a file; warns if the file does not determine it.

    Args:
        layer: of the parameter.
        entry: of its lora_A; None if there is none.
        config: the adapter's.
    """
    if len(layer.weight_shape) == 2:
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
            "factors of a stack of square matrices is lora_A; they are read as by PEFT "
            f"{'0.17' if found is None else '.'.join(map(str, numbers))}. If another wrote them, "
            "put its version into adapter_config.json: 0.21.2 for ours",
            stacklevel=2,
        )
    if numbers >= _FIXED:
        return False
    return numbers >= (0, 19, 0) or not transposed


def warn_of_unsloth(config: AdapterConfig, targets: Iterable[tuple[LoRAParameter, int]]) -> None:
    """Warns of a file from Unsloth that does not state the layout of lora_B.

    Args:
        config: the adapter's.
        targets: the parameters that get the adapter, each with its rank.
    """
    unclear = any(layer.count > 1 and r > 1 for layer, r in targets)
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
            f"expected factors for each of the parameters {names} of {path!r}, which "
            f"target_parameters {shown(list(config.target_parameters))} names, but the file has "
            f"{depth + 1} (one, and one for each 'base_layer' in a key)"
        )


def parameter_of(path: str, name: str, layers: Iterable[LoRAParameter]) -> LoRAParameter:
    """The layer of a parameter by its name.

    Raises:
        AdapterError: it cannot have an adapter.
    """
    found = {layer.parameter: layer for layer in layers}
    if name not in found:
        raise AdapterError(
            f"expected target_parameters to name weights, which are {some(found)} of {path!r}, "
            f"but it names {name!r}"
        )
    return found[name]


def in_file(
    path: str, layers: Mapping[str, LoRAParameter], entries: Mapping[str, Entry]
) -> list[str]:
    """The names of parameters, that of the innermost wrapper first.

    PEFT wraps the parameters of quantised experts by the alphabet, of others in the module's order,
    and a file of the ones may be loaded into the others: the factors' sizes say what they are of.

    Args:
        path: of the module.
        layers: by the parameters' names, in the order of this module's wrappers.
        entries: of the file.
    """
    names = list(layers)

    def fits(order: list[str]) -> bool:
        depths = reversed(range(len(order)))
        return all(_is_of(layers[n], path, d, entries) for n, d in zip(order, depths, strict=True))

    return names[::-1] if not fits(names) and fits(names[::-1]) else names


def _is_of(layer: LoRAParameter, path: str, depth: int, entries: Mapping[str, Entry]) -> bool:
    """Whether factors in a file have the sizes of a parameter's, swapped or not."""
    slots = parameter_slots(path, depth, ((0, 0), (0, 0)))
    lora_a, lora_b = (entries.get(slot.key) for slot in slots)
    if lora_a is None or lora_b is None or len(lora_a.shape) != 2 or len(lora_b.shape) != 2:
        return False
    return {lora_a.shape[1], lora_b.shape[0]} == set(layer.matrix_shape)


def parameter_slots(path: str, depth: int, shapes: tuple[tuple[int, int], ...]) -> list[Slot]:
    """The tensors that PEFT stores for a parameter.

    Args:
        path: of the module.
        depth: number of wrappers around that of the parameter.
        shapes: of lora_A and lora_B in the file.
    """
    start = f"{PREFIX}{path}{_INNER * depth}."
    keys = (("lora_A.weight", "lora_a"), ("lora_B.weight", "lora_b"))
    return [Slot(start + k, table, s) for (k, table), s in zip(keys, shapes, strict=True)]
