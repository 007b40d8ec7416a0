"""Adapter files whose factors are those of each expert's gate, up and down projection: files from
before transformers 5, which had a linear layer for each expert.

    <path>.<e>.gate_proj.lora_A.weight [r, in], lora_B.weight [out, r]      w1 in Mixtral
    <path>.<e>.up_proj...                                                   w3
    <path>.<e>.down_proj...                                                 w2

Others have one tensor for all experts, as Tinker and SGLang: with 1 instead of E where all have the
same factor, which are A of gate and up and B of down ("shared outer").

    <path>.w1.lora_A.weight [E, r, in], lora_B.weight [E, out, r]

Now one stack has the rows of gate and up. Its factors combine those of both,

    A_e = [A_gate; A_up]  [2 r, in]        B_e = diag(B_gate, B_up)  [2 out, 2 r]

with an alpha that keeps the scaling, so that every product stays the same; the rows of B for a
projection without an adapter are zero, and lie where the stack has that projection's rows: those of
gate and up alternate in gpt-oss. The router also was a linear layer, and now is a parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.decorated import has_gate, is_concatenated, up_name
from ..models.mixtures import routers
from ..nn.experts import is_experts
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import stack_of
from .alphas import find_alphas
from .errors import AdapterError, shown, some
from .layout import PREFIX, path_of_factor
from .names import escaped
from .parameters import is_named, named_parameters, parameter_slots
from .peft_config import PEFT_VERSION, AdapterConfig
from .targets import base_modules
from .tensors import Entry, TensorFile

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_PROJECTION = re.compile(r"(.+?)(?:\.(0|[1-9]\d{0,5}))?\.(gate_proj|up_proj|down_proj|w1|w3|w2)")
_TODAY = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_ALL = -1  # in the place of an expert's number
# (projection, "A" or "B", expert or _ALL) -> its entry in the file
Factors = dict[tuple[str, str, int], Entry]


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter, for all its experts.

    Attributes:
        name: of the parameter, with its path.
        rows: the projections whose rows it contains.
        adapted: the projections that have an adapter.
        count: E.
        rank: the rank of each projection's adapter.
        features: (in, out) of each projection.
        factors: in the file.
        alternates: whether a row of each projection follows one of the other.
    """

    name: str
    rows: tuple[str, ...]
    adapted: tuple[str, ...]
    count: int
    rank: int
    features: tuple[int, int]
    factors: Factors
    alternates: bool

    def shape(self, factor: str) -> tuple[int, int]:
        """The shape of lora_A ``[E R, in]`` or lora_B ``[out, R E]``; R is the rank of all
        projections together."""
        ranks = self.count * self.rank * len(self.adapted)
        in_features, out_features = self.features
        if factor == "A":
            return ranks, in_features
        return len(self.rows) * out_features, ranks

    def check(self) -> None:
        """Raises AdapterError if a factor is missing, is one too many or has another size."""
        in_features, out_features = self.features
        shapes = {"A": (self.rank, in_features), "B": (out_features, self.rank)}
        for part in self.adapted:
            for factor, shape in shapes.items():
                whole = self.factors.get((part, factor, _ALL))
                if whole is not None:
                    _check(whole, (1, *shape), (self.count, *shape))
                    continue
                for e in range(self.count):
                    entry = self.factors.get((part, factor, e))
                    if entry is None:
                        raise AdapterError(
                            f"expected {part} of each of the {self.count} experts of "
                            f"{self.name!r}, but lora_{factor} of expert {e} is missing"
                        )
                    _check(entry, shape)
        more = [
            entry.name
            for (part, factor, e), entry in self.factors.items()
            if e >= self.count or (e != _ALL and (part, factor, _ALL) in self.factors)
        ]
        if more:
            raise AdapterError(
                f"expected factors of the {self.count} experts of {self.name!r}, but got "
                f"{some(more)}"
            )

    def alpha(self, config: AdapterConfig) -> float:
        """The alpha that keeps each projection's scaling with the rank of all together.

        Raises:
            AdapterError: the projections do not have the same alpha.
        """
        paths = {path_of_factor(entry.name) or "" for entry in self.factors.values()}
        alphas = set(find_alphas(paths, config).values())
        if len(alphas) > 1:
            raise AdapterError(
                f"expected one lora_alpha for all experts of {self.name!r}, but alpha_pattern "
                f"gives {some(map(str, alphas))}"
            )
        times = len(self.adapted)
        return alphas.pop() * (math.sqrt(times) if config.use_rslora else times)

    def read(self, file: TensorFile, factor: str, dtype: torch.dtype | None) -> Tensor:
        """The factor as PEFT stores it for a stack."""
        parts = [self._of_each(file, part, factor, dtype) for part in self.adapted]
        if factor == "A":
            return torch.cat(parts, 1).flatten(0, 1)
        out = self.features[1]
        lora_b = parts[0].new_zeros(self.shape("B")).unflatten(1, (-1, self.count))
        for number, (part, each) in enumerate(zip(self.adapted, parts, strict=True)):
            row, column = self.rows.index(part), number * self.rank
            rows = slice(row * out, (row + 1) * out)
            if self.alternates:
                rows = slice(row, None, len(self.rows))
            lora_b[rows, column : column + self.rank] = each.permute(1, 2, 0)
        return lora_b.flatten(1)

    def _of_each(
        self, file: TensorFile, part: str, factor: str, dtype: torch.dtype | None
    ) -> Tensor:
        """A projection's factor ``[E, ...]``."""
        whole = self.factors.get((part, factor, _ALL))
        if whole is not None:
            return file.read(whole, dtype).expand(self.count, -1, -1)
        every = range(self.count)
        return torch.stack([file.read(self.factors[part, factor, e], dtype) for e in every])


def _check(entry: Entry, *shapes: tuple[int, ...]) -> None:
    """Raises AdapterError for an entry with none of the shapes."""
    if entry.shape not in shapes or not entry.is_floating:
        raise AdapterError(
            f"{shown(entry.name, 200)}: expected shape {' or '.join(map(str, map(list, shapes)))} "
            f"and a floating dtype, but got {list(entry.shape)} and {entry.dtype}"
        )


class _StackedFile(TensorFile):
    """A view of a file in which the stacks' factors have the current keys.

    Args:
        file: the file that is read.
        others: its other tensors, by their current keys.
        stacks: key -> stack, and "A" or "B".
    """

    def __init__(
        self, file: TensorFile, others: dict[str, Entry], stacks: dict[str, tuple[Stack, str]]
    ) -> None:
        self._source, self._stacks = file, stacks
        self.entries = dict(others)
        for key, (stack, factor) in stacks.items():
            self.entries[key] = Entry(key, "F32", stack.shape(factor))

    def read(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        if entry.name not in self._stacks:
            return self._source.read(entry, dtype)
        stack, factor = self._stacks[entry.name]
        return stack.read(self._source, factor, dtype)


def with_stacks(
    file: TensorFile, config: AdapterConfig, model: nn.Module
) -> tuple[TensorFile, AdapterConfig]:
    """A file and its config as if PEFT had written them for the model's stacks. Both are returned
    unchanged if no key belongs to a projection of experts, or to a router that target_parameters
    does not name.

    Raises:
        AdapterError: an expert's factors are missing, or differ in rank, size or alpha; or there is
            dropout beside a router.
    """
    modules = base_modules(model)
    at_router = routers(list(modules.items()))
    others: dict[str, Entry] = {}
    apart: dict[str, Factors] = {}
    names: list[str] = []
    for key, entry in file.entries.items():
        found = _FACTOR.fullmatch(key)
        path = _path_of_today(found[1], modules) if found else ""
        of = _PROJECTION.fullmatch(path)
        if found and of and of[1] in modules and is_experts(modules[of[1]]):
            part, expert = _TODAY.get(of[3], of[3]), _ALL if of[2] is None else int(of[2])
            apart.setdefault(of[1], {})[part, found[2], expert] = entry
            continue
        name = f"{path}.weight"
        if id(modules.get(path)) in at_router and not is_named(name, config.target_parameters):
            names.append(name)
        others[key.replace(found[1], path) if found else key] = entry
    if not (apart or names):
        return file, config
    if config.dropout and names:
        raise AdapterError(
            f"expected lora_dropout 0 beside an adapter on the router {names[0]!r}, which is a "
            f"parameter since transformers 5 and is computed as W + B A, but got {config.dropout}; "
            "it matters in training alone: to load the adapter without, put "
            '"lora_dropout": 0 into adapter_config.json'
        )
    stacks = {p: _stacks(p, modules[p], factors, config) for p, factors in apart.items()}
    every = [stack for each in stacks.values() for stack in each]
    names += [stack.name for stack in every]
    alphas = {f"^{escaped(stack.name)}": stack.alpha(config) for stack in every}
    ranks = {stack.name: stack.rank * len(stack.adapted) for stack in every}
    keys = dict(_keys(stacks))
    if len(others | keys) + sum(map(len, apart.values())) != len(file.entries) + len(keys):
        raise AdapterError(
            "expected each tensor once, but the file has one by two of its names, such as those in "
            "transformers 4 and 5"
        )
    config = replace(
        config,
        target_parameters=(*config.target_parameters, *names),
        rank_pattern={**config.rank_pattern, **ranks},
        alpha_pattern={**alphas, **config.alpha_pattern},
        peft_version=PEFT_VERSION,
        lora_b_layout=None,
        is_of_unsloth=False,
    )
    return _StackedFile(file, others, keys), config


def _keys(stacks: Mapping[str, list[Stack]]) -> Iterator[tuple[str, tuple[Stack, str]]]:
    """(current key, (stack, "A" or "B"))."""
    for path, of_path in stacks.items():
        for depth, stack in enumerate(reversed(of_path)):
            slots = parameter_slots(path, depth, (stack.shape("A"), stack.shape("B")))
            for slot, factor in zip(slots, "AB", strict=True):
                yield slot.key, (stack, factor)


def _path_of_today(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The current path: Mixtral's block had another name."""
    if path.partition(".experts.")[0] in modules:
        return path
    return path.replace(".block_sparse_moe.", ".mlp.")


def _stacks(path: str, module: Any, factors: Factors, config: AdapterConfig) -> list[Stack]:
    """The stacks of a module's parameters, that of the innermost wrapper first."""
    rows = {
        up_name(module): ("gate_proj", "up_proj") if has_gate(module) else ("up_proj",),
        "down_proj": ("down_proj",),
    }
    known = [part for parts in rows.values() for part in parts]
    others = {part for part, _, _ in factors} - set(known)
    if others:
        raise AdapterError(
            f"expected factors of {known} of {path!r}, which has no other projections, but got "
            f"{sorted(others)}"
        )
    found = []
    for name in named_parameters(path, module, [f"{path}.{each}" for each in rows]):
        adapted = tuple(part for part in rows[name] if any(part == of for of, _, _ in factors))
        if not adapted:
            continue
        stored = stack_of(module, name)
        assert isinstance(stored, (Tensor, QuantizedStack))
        count, *sides = stored.shape
        in_features, out_features = sides if module.is_transposed else reversed(sides)
        own = {key: entry for key, entry in factors.items() if key[0] in adapted}
        features = (in_features, out_features // len(rows[name]))
        first = own.get((adapted[0], "A", 0)) or own.get((adapted[0], "A", _ALL))
        found_rank = first.shape[-2] if first and len(first.shape) > 1 else 0
        rank = found_rank if found_rank in config.rank_pattern.values() else config.r
        alternates = not is_concatenated(module)
        stack = Stack(f"{path}.{name}", rows[name], adapted, count, rank, features, own, alternates)
        stack.check()
        found.append(stack)
    return found
