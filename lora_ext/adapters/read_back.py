"""Reads a written adapter as its readers do, and compares it with the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .alphas import find_alphas
from .content import Content
from .errors import AdapterError, some
from .parameters import is_named
from .peft_config import parse_config
from .separate_experts import with_stacks
from .tensors import open_tensors


def check_written(
    path: str, data: bytes, layout: str, content: Content, whole: Mapping[str, Tensor]
) -> None:
    """Raises AdapterError if the safetensors file at `path` with the config `data` is not the
    model's adapter: for random x, in float64, W x + s B A x has to be that of each layer (W x is
    left out), and all else what `whole` has, the tensors in PEFT's layout. In other layouts r and
    lora_alpha alone have to give the scaling, too: some engines read nothing else.
    """
    name, rest, own = "", dict(whole), parse_config(data)
    try:
        with open(path, "rb") as opened, open_tensors(opened.fileno()) as stored:
            file, config = with_stacks(stored, own, content.model)
            found = dict(file.entries)
            by_rank = replace(config, alpha=config.r, alpha_pattern=config.rank_pattern)
            for name, spec in content.specs.items():
                keys = [slot.key for slot in content.slots(name)]
                count = content.parameters[name].count if name in content.parameters else 1
                weight = f"{name}.weight"
                at = weight if is_named(weight, config.target_parameters) else name
                rank, alpha = int(find_alphas([at], by_rank)[at]), find_alphas([at], config)[at]
                scaling = alpha / (rank**0.5 if config.use_rslora else rank)
                if layout != "peft" and not math.isclose(scaling, own.alpha / own.r):
                    raise ValueError(f"scaling {scaling}, but another by r and lora_alpha alone")
                lora_a, lora_b, *bias = (file.read(found.pop(key)) for key in keys)
                expected_a, expected_b, *expected_bias = map(rest.pop, keys)
                random = torch.Generator().manual_seed(1)
                x = torch.randn(expected_a[0].numel(), 4, dtype=torch.float64, generator=random)
                expected = spec.scaling * _product(expected_a, expected_b, x, spec.r, count)
                _compare(scaling * _product(lora_a, lora_b, x, rank, count), expected)
                for each, expected in zip(bias, expected_bias, strict=True):
                    _compare(each * scaling, expected * spec.scaling)
            for name, expected in rest.items():
                if not torch.equal(file.read(found.pop(name)), expected):
                    raise ValueError("other values")
        if found:
            raise ValueError(f"tensors that nothing reads: {some(found)}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"expected a file of which its readers make the model's {name!r}, but got {error}; the "
            "folder is as it was; another layout may do, and please report it"
        ) from None


def _product(a: Tensor, b: Tensor, x: Tensor, rank: int, count: int) -> Tensor:
    """B A x ``[E, out, 4]`` of factors as PEFT stores them."""
    inner = (a.double().flatten(1) @ x).view(count, rank, -1)
    return b.double().reshape(len(b), rank, count).permute(2, 0, 1) @ inner


def _compare(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of a B in float32 that was multiplied."""
    error = (found.double() - expected.double()).abs().max()
    if found.shape != expected.shape or not error <= 1e-6 * expected.double().abs().max():
        raise ValueError(f"other values, with an error of {error:.1e}")
