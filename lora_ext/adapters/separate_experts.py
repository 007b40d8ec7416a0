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
from collections.abc import Mapping
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
from .errors import AdapterError, some
from .layout import FACTOR, PREFIX, WRAPPED, path_of_factor
from .parameters import named_parameters
from .peft_config import PEFT_VERSION, AdapterConfig
from .targets import anchored, base_modules, named
from .tensors import Entry, TensorFile

# PEFT's conversion of such files is not called: it needs PEFT, which reading a folder does not; it
# is not public, and takes other arguments in 0.19 than in 0.21; it knows the configs of two model
# types, wants gate and up together, and reads a stranger's tensors before it checks a shape.
_PROJECTION = re.compile(r"(.+?)(?:\.(0|[1-9]\d{0,5}))?\.(gate_proj|up_proj|down_proj|w1|w3|w2)")
TODAY = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_ALL = -1  # in the place of an expert's number
# (projection, "A" or "B") -> expert or _ALL -> its entry in the file
Factors = dict[tuple[str, str], dict[int, Entry]]


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter, for all its experts.

    Attributes:
        name: of the parameter, with its path.
        places: each projection that has an adapter -> its rows of the stack.
        count: E.
        rank: the rank of each projection's adapter.
        features: (in, out) of the stack.
        size: out of each projection.
        factors: in the file, of these projections.
    """

    name: str
    places: Mapping[str, slice]
    count: int
    rank: int
    features: tuple[int, int]
    size: int
    factors: Factors

    def shape(self, letter: str) -> tuple[int, int]:
        """The shape of lora_A ``[E R, in]`` or lora_B ``[out, R E]``; R is the rank of all
        projections together."""
        ranks = self.count * self.rank * len(self.places)
        return (ranks, self.features[0]) if letter == "A" else (self.features[1], ranks)

    def check(self) -> None:
        """Raises AdapterError if a factor is missing, is one too many or has another size."""
        shapes = {"A": (self.rank, self.features[0]), "B": (self.size, self.rank)}
        more: list[str] = []
        for part in self.places:
            for letter, shape in shapes.items():
                left = dict(self.factors.get((part, letter), {}))
                whole = left.pop(_ALL, None)
                if whole is not None:
                    whole.check((1, *shape), (self.count, *shape))
                for e in range(self.count if whole is None else 0):
                    if e not in left:
                        raise AdapterError(
                            f"expected {part} of each of the {self.count} experts of "
                            f"{self.name!r}, but lora_{letter} of expert {e} is missing"
                        )
                    left.pop(e).check(shape)
                more += [entry.name for entry in left.values()]
        if more:
            raise AdapterError(
                f"expected tensors of the {self.count} experts of {self.name!r}, but got "
                f"{some(more)}"
            )

    def alpha(self, config: AdapterConfig) -> float:
        """The alpha that keeps each projection's scaling with the rank of all together.
        AdapterError if the projections do not have the same alpha."""
        entries = [entry for own in self.factors.values() for entry in own.values()]
        paths = {path_of_factor(entry.name) or "" for entry in entries}
        alphas = set(find_alphas(paths, config).values())
        if len(alphas) > 1:
            raise AdapterError(
                f"expected one lora_alpha for all experts of {self.name!r}, but alpha_pattern "
                f"gives {some(map(str, alphas))}"
            )
        times = len(self.places)
        return alphas.pop() * (math.sqrt(times) if config.use_rslora else times)

    def read(self, file: TensorFile, letter: str, dtype: torch.dtype | None) -> Tensor:
        """The factor as PEFT stores it for a stack."""
        parts = []  # [E, ...] of each projection
        for part in self.places:
            own = self.factors[part, letter]
            if _ALL in own:
                parts.append(file.read(own[_ALL], dtype).expand(self.count, -1, -1))
            else:
                each = [file.read(own[e], dtype) for e in range(self.count)]
                parts.append(torch.stack(each))
        if letter == "A":
            return torch.cat(parts, 1).flatten(0, 1)
        lora_b = parts[0].new_zeros(self.shape("B")).unflatten(1, (-1, self.count))
        for number, (rows, each) in enumerate(zip(self.places.values(), parts, strict=True)):
            column = number * self.rank
            lora_b[rows, column : column + self.rank] = each.permute(1, 2, 0)
        return lora_b.flatten(1)


class _StackedFile(TensorFile):
    """A view of a file that has stacks, key -> (stack, "A" or "B"), beside its other tensors."""

    def __init__(
        self, file: TensorFile, others: dict[str, Entry], stacks: dict[str, tuple[Stack, str]]
    ) -> None:
        self._source, self._stacks = file, stacks
        made = {key: Entry(key, "F32", stack.shape(of)) for key, (stack, of) in stacks.items()}
        self.entries = {**others, **made}

    def read(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        if entry.name not in self._stacks:
            return self._source.read(entry, dtype)
        stack, letter = self._stacks[entry.name]
        return stack.read(self._source, letter, dtype)


def with_stacks(
    file: TensorFile, config: AdapterConfig, model: nn.Module
) -> tuple[TensorFile, AdapterConfig]:
    """A file and its config as if PEFT had written them for the model's stacks. Both are returned
    unchanged if no key belongs to a projection of experts, or to a router that target_parameters
    does not name. AdapterError if an expert's factors are missing or differ in rank, size or alpha,
    or there is dropout beside a router."""
    modules = base_modules(model)
    at_router = routers(list(modules.items()))
    others: dict[str, Entry] = {}
    apart: dict[str, Factors] = {}
    names: list[str] = []
    for key, entry in file.entries.items():
        found = FACTOR.fullmatch(key)
        found = found if found and found[2] else None
        path = _path_of_today(found[1], modules) if found else ""
        of = _PROJECTION.fullmatch(path)
        if found and of and of[1] in modules and is_experts(modules[of[1]]):
            part, expert = TODAY.get(of[3], of[3]), _ALL if of[2] is None else int(of[2])
            apart.setdefault(of[1], {}).setdefault((part, found[2]), {})[expert] = entry
            continue
        if id(modules.get(path)) in at_router:
            names.append(f"{path}.weight")
        others[key.replace(found[1], path) if found else key] = entry
    known = set(named(names, config.target_parameters))
    names = [name for name in names if name not in known]
    if not (apart or names):
        return file, config
    if config.lora_dropout and names:
        raise AdapterError(
            f"expected lora_dropout 0 beside an adapter on the router {names[0]!r}, which is a "
            "parameter since transformers 5 and is computed as W + B A, but got "
            f"{config.lora_dropout}; it matters in training alone: to load the adapter without, "
            'put "lora_dropout": 0 into adapter_config.json'
        )
    keys: dict[str, tuple[Stack, str]] = {}
    every: list[Stack] = []
    for path, factors in apart.items():
        stacks = _stacks(path, modules[path], factors, config)
        every += stacks
        for depth, stack in enumerate(reversed(stacks)):
            start = f"{PREFIX}{path}{WRAPPED * depth}"
            keys |= {f"{start}.lora_{letter}.weight": (stack, letter) for letter in "AB"}
    names += [stack.name for stack in every]
    alphas = {anchored(stack.name): stack.alpha(config) for stack in every}
    ranks = {stack.name: stack.rank * len(stack.places) for stack in every}
    apart_count = sum(len(own) for factors in apart.values() for own in factors.values())
    if len(others | keys) + apart_count != len(file.entries) + len(keys):
        raise AdapterError(
            "expected each tensor once, but the file has one under two names, such as those of "
            "transformers 4 and of 5"
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


def _path_of_today(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The current path: Mixtral's block had another name."""
    if path.partition(".experts.")[0] in modules:
        return path
    return path.replace(".block_sparse_moe.", ".mlp.")


def _stacks(path: str, module: Any, factors: Factors, config: AdapterConfig) -> list[Stack]:
    """The stacks of a module's parameters, that of the innermost wrapper first."""
    of_up = ("gate_proj", "up_proj") if has_gate(module) else ("up_proj",)
    parts = {up_name(module): of_up, "down_proj": ("down_proj",)}
    known, given = [*of_up, "down_proj"], {part for part, _ in factors}
    if others := given.difference(known):
        raise AdapterError(
            f"expected tensors of {known} of {path!r}, which has no other projections, but got "
            f"{sorted(others)}"
        )
    found = []
    for name in named_parameters(path, module, [f"{path}.{each}" for each in parts]):
        if given.isdisjoint(parts[name]):
            continue
        stored = stack_of(module, name)
        assert isinstance(stored, (Tensor, QuantizedStack))
        count, *sides = stored.shape
        in_features, out_features = sides if module.is_transposed else reversed(sides)
        number = len(parts[name])
        size = out_features // number
        places = {
            part: slice(row * size, (row + 1) * size)
            if is_concatenated(module)
            else slice(row, None, number)
            for row, part in enumerate(parts[name])
            if part in given
        }
        own = {key: entries for key, entries in factors.items() if key[0] in places}
        of_a = own.get((next(iter(places)), "A"), {})
        first = of_a.get(0) or of_a.get(_ALL)
        found_rank = first.shape[-2] if first and len(first.shape) > 1 else 0
        rank = found_rank if found_rank in config.rank_pattern.values() else config.r
        features = (in_features, out_features)
        found.append(Stack(f"{path}.{name}", places, count, rank, features, size, own))
        found[-1].check()
    return found
