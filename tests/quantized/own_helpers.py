"""Quantised layers of every library with adapters of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import bases
from contract.bases import QUANTISED
from format_helpers import needs, plain_linear
from helpers import BF16, F32, F64
from layer_helpers import randomize
from torch import Tensor, nn

import lora_ext
from lora_ext.nn import LoRALayer

DTYPES = (F32, BF16)
WIDTH, HEIGHT = 128, 96
ROWS = 20  # more than GGUF's kernels for few rows take


# Without the second form of torchao, and without the codes that only this package multiplies by:
# these tests compare with the base's own forward.
KINDS = [
    pytest.param(kind, marks=needs(package), id=kind)
    for kind, (_, package, _) in QUANTISED.items()
    if kind not in ("torchao int4", "fp8 codes")
]
# Those that PEFT has layers for.
OF_PEFT = [param for param in KINDS if QUANTISED[param.id][2]]
FEW = [param for param in KINDS if param.id in bases.FEW]


def base(kind: str, dtype: torch.dtype = F32) -> nn.Module:
    """A frozen layer ``[HEIGHT, WIDTH]`` with a bias, in training mode; "dense" to compare with."""
    plain = plain_linear(HEIGHT, WIDTH)
    made = plain.to(dtype) if kind == "dense" else QUANTISED[kind][0](plain, dtype)
    return made.requires_grad_(False)


class Net(nn.Module):
    """Two quantised layers and a dense one."""

    def __init__(self, kind: str, dtype: torch.dtype = F32) -> None:
        super().__init__()
        self.up, self.other = base(kind, dtype), base(kind, dtype)
        self.down = plain_linear(WIDTH, HEIGHT, True, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) + self.other(x))


def adapted(
    model: nn.Module,
    adapter: str = "default",
    adapter_dtype: torch.dtype | None = None,
    **words: Any,
) -> nn.Module:
    """The model with random adapters in all linear layers."""
    config = lora_ext.LoraConfig("all-linear", **({"r": 8, "lora_alpha": 16.0} | words))
    lora_ext.apply_lora(model, config, adapter, adapter_dtype=adapter_dtype)
    return randomize(model)


def one_layer(kind: str, dtype: torch.dtype = F32, **words: Any) -> LoRALayer:
    """A quantised layer with a random adapter."""
    return adapted(nn.Sequential(base(kind, dtype)), **words)[0]


def make_x(dtype: torch.dtype = F32, lead: tuple[int, ...] = (ROWS,)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*lead, WIDTH, generator=generator, dtype=F64).to(dtype)


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two entries of a state dict are equal; torchao's are compared dequantised."""
    if hasattr(first, "dequantize") and type(first) not in (Tensor, nn.Parameter):
        first, second = first.dequantize(), second.dequantize()
    return torch.equal(first, second)


def weight_of(layer: nn.Module, x: Tensor) -> Tensor:
    """W ``[out, in]`` in float64, as the layer has it for x."""
    return bases.weight_of(layer, x, layer.base_type if isinstance(layer, LoRALayer) else None)


def exact(layer: LoRALayer, x: Tensor) -> Tensor:
    """y of the active adapters without dropout, from the formula in float64."""
    x, weight = x.double(), weight_of(layer, x)
    y = x @ weight.t() + layer.bias.double()
    for name in layer.active_adapters:
        lora_a, lora_b = (factor.double() for factor in layer.factors(name))
        update = x @ lora_a.t() @ lora_b.t()
        if name in layer.lora_bias:
            update = update + layer.lora_bias[name].double()
        y = y + layer.adapters[name].scaling * update
    return y


def make_grad(y: Tensor) -> Tensor:
    """The same dy each time."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, the gradient of x and those of all parameters that have one, for a fixed dy."""
    leaf = x.detach().clone().requires_grad_()
    y = model(leaf)
    y.backward(make_grad(y))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **found}
