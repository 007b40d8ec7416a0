"""Weights of experts in torchao's tensors, its own or stand-ins for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from format_helpers import needs
from torch import Tensor, nn

GROUP = 32
_PARTS = ("qdata", "scale", "zero_point")


class Int8Tensor(Tensor):
    """torchao's class of this name, as far as it is read here."""

    act_quant_kwargs = act_pre_scale = None

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], block_size: Sequence[int], dtype: torch.dtype) -> Any:
        shape, device = parts[0].shape, parts[0].device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, parts: Sequence[Tensor], block_size: Sequence[int], dtype: Any) -> None:
        self.qdata, self.scale, self.zero_point = parts
        self.block_size = list(block_size)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_PARTS), (self.block_size, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: Any, *_: Any) -> Int8Tensor:
        return cls([parts[name] for name in _PARTS], *context)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, (self, *others) = torch.ops.aten, args
        if func is aten.select.int:  # a plain matrix, for transformers' own forward
            return self.dequantize().select(*others)
        if func not in (aten.detach.default, aten.clone.default, aten.alias.default):
            raise NotImplementedError(func)
        parts = [func(getattr(self, name), *others, **(kwargs or {})) for name in _PARTS]
        return cls(parts, self.block_size, self.dtype)

    def dequantize(self) -> Tensor:
        values = self.qdata.to(self.dtype).unflatten(2, (-1, self.block_size[2]))
        values = values - self.zero_point.to(self.dtype)[..., None]
        return (values * self.scale[..., None]).flatten(2).to(self.dtype)


Int8Tensor.__module__ = "torchao.quantization"


def stand_in(weight: Tensor, group: int, point: int) -> nn.Parameter:
    values = weight.float().unflatten(2, (-1, group))
    scale = values.abs().amax(3) / 100
    codes = ((values / scale[..., None]).round() + point).to(torch.int8).flatten(2)
    zero = torch.full(scale.shape, point, dtype=torch.int8)
    parts = Int8Tensor((codes, scale, zero), (1, 1, group), weight.dtype)
    return nn.Parameter(parts, requires_grad=False)


def config(form: str) -> Any:
    from torchao import quantization as ao
    from torchao.quantization import granularity

    kind, _, size = form.partition(" ")
    of = {"": granularity.PerRow(), "columns": granularity.PerRow(dim=1)}
    of |= {"all": granularity.PerTensor(), "groups": granularity.PerGroup(GROUP)}
    make = {"int8": ao.Int8WeightOnlyConfig, "float8": ao.Float8WeightOnlyConfig}[kind]
    return make(granularity=of[size])


STAND_INS = {"stand-in": (None, 0), "stand-in groups": (GROUP, 0), "stand-in points": (GROUP, 7)}
SIZES = ("", " columns", " all", " groups")
OWN = [kind + size for kind in ("int8", "float8") for size in SIZES]


def forms(*names: str) -> list[Any]:
    """Parameters of a test; torchao's own only where it is installed."""
    return [torch_form(name) for name in names or (*STAND_INS, *OWN)]


def torch_form(name: str) -> Any:
    import pytest

    return pytest.param(name, marks=[] if name in STAND_INS else needs("torchao"))


def quantise(module: nn.Module, name: str, form: str) -> None:
    """A parameter of a module, by torchao's `quantize_`."""
    if form in STAND_INS:
        weight = module.get_parameter(name).data
        group, point = STAND_INS[form]
        setattr(module, name, stand_in(weight, group or weight.shape[2], point))
        return
    from torchao.quantization import FqnToConfig, quantize_

    quantize_(module, FqnToConfig({name: config(form)}), filter_fn=None)
