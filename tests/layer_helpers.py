"""Layers of every kind with adapters, and what they must compute, from the formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from helpers import F32, F64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext import LoRALinear
from lora_ext.nn import AdapterSpec, LoRAConv2d, LoRAEmbedding, LoRALayer, LoRAMergedLinear

IN, OUT, VOCAB = 12, 18, 20
GROUPS = (True, False, True)  # of the merged linear layer
KINDS = ("linear", "conv1d", "fan_in_fan_out", "embedding", "conv2d", "merged_linear")
MATRIX_KINDS = tuple(kind for kind in KINDS if kind != "embedding")


def make_base(kind: str, dtype: torch.dtype = F32) -> nn.Module:
    """The plain module that a kind of layer stands for."""
    base = {
        "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
        "conv1d": lambda: Conv1D(OUT, IN),
        "embedding": lambda: nn.Embedding(VOCAB, OUT, padding_idx=0),
        "conv2d": lambda: nn.Conv2d(IN, OUT, 1),
    }.get(kind, lambda: nn.Linear(IN, OUT))()
    if kind == "conv1d":
        nn.init.normal_(base.bias)
    return base.to(dtype)


def make_layer(
    kind: str,
    specs: dict[str, AdapterSpec] | None = None,
    dtype: torch.dtype = F32,
    adapter_dtype: torch.dtype | None = None,
) -> LoRALayer:
    """A layer with random adapters, all active; by default one of rank 4 and scaling 1.5."""
    if kind == "fan_in_fan_out":
        layer = LoRALinear(IN, OUT, dtype=dtype, r=0, fan_in_fan_out=True)
    else:
        kinds = {
            "embedding": LoRAEmbedding,
            "conv2d": LoRAConv2d,
            "merged_linear": LoRAMergedLinear,
        }
        layer = kinds.get(kind, LoRALinear).around(make_base(kind, dtype))
    if kind == "merged_linear":
        layer.enable_groups(GROUPS)
    specs = {"default": AdapterSpec(4, 6.0)} if specs is None else specs
    for name, spec in specs.items():
        layer.add_adapter(name, spec, adapter_dtype)
    layer.set_adapter(specs)
    return randomize(layer)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in all factors and in their biases, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    for layer in layers:
        for table in (layer.lora_a, layer.lora_b, layer.lora_bias):
            for parameter in table.values():
                values = torch.randn(parameter.shape, generator=generator, dtype=F64)
                parameter.copy_(0.4 * values)
    return model


def make_input(kind: str, dtype: torch.dtype = F32, lead: Sequence[int] = (4, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "embedding":
        return torch.randint(0, VOCAB, tuple(lead), generator=generator)
    shape = (2, IN, 3, 5) if kind == "conv2d" else (*lead, IN)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def delta(layer: LoRALayer, name: str, factors: dict[str, Tensor] | None = None) -> Tensor:
    """scaling * B A of one adapter, laid out as the weight, in float64; from `factors` if given."""
    stored = {key: getattr(layer, key).get(name) for key in ("lora_a", "lora_b")}
    lora_a, lora_b = ((factors or stored)[key].double() for key in ("lora_a", "lora_b"))
    spec = layer.adapters[name]
    scaling = spec.lora_alpha / (spec.r**0.5 if spec.use_rslora else spec.r)
    if isinstance(layer, LoRAMergedLinear) and not all(layer.enable_lora):
        height = OUT // len(GROUPS)
        product, done = lora_a.new_zeros(OUT, IN), 0
        for group, enabled in enumerate(layer.enable_lora):
            if enabled:
                a = lora_a[done * spec.r : (done + 1) * spec.r]
                b = lora_b[done * height : (done + 1) * height]
                product[group * height : (group + 1) * height] = b @ a
                done += 1
    else:
        product = lora_b @ lora_a
    if name in layer.lora_a_init:
        product = product - layer.lora_b_init[name].double() @ layer.lora_a_init[name].double()
    if isinstance(layer, LoRAEmbedding) or getattr(layer, "fan_in_fan_out", False):
        product = product.t()
    return scaling * product.reshape(layer.weight.shape)


def forward(layer: LoRALayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The base module's function with another weight and bias."""
    if isinstance(layer, LoRAEmbedding):
        return F.embedding(x, weight, layer.padding_idx)
    if isinstance(layer, LoRAConv2d):
        return F.conv2d(x, weight, bias, layer.stride)
    return F.linear(x, weight.t() if layer.fan_in_fan_out else weight, bias)


def exact(layer: LoRALayer, x: Tensor, names: Sequence[str] | None = None) -> Tensor:
    """The layer without dropout in float64: the base with the sum of the deltas."""
    names = layer.active_adapters if names is None else names
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    for name in names:
        weight = weight + delta(layer, name)
        if name in layer.lora_bias:
            spec = layer.adapters[name]
            update = layer.lora_bias[name].double() * spec.scaling
            bias = update if bias is None else bias + update
    return forward(layer, x.double() if x.is_floating_point() else x, weight, bias)


def in_peft_order(layer: LoRALayer, x: Tensor, base: Any = None) -> Tensor:
    """The layer as PEFT computes it in the same dtypes: what errors are compared with.

    base: computes y of the base, in the place of torch
    """
    y = forward(layer, x, layer.weight, layer.bias) if base is None else base(x)
    dtype = y.dtype
    for name in layer.active_adapters:
        lora_a, lora_b = layer.factors(name)
        bias = layer.lora_bias.get(name)
        if isinstance(layer, LoRAEmbedding):
            update = F.embedding(x, lora_a.t(), layer.padding_idx) @ lora_b.t()
        elif isinstance(layer, LoRAConv2d):
            shrunk = F.conv2d(x.to(lora_a.dtype), lora_a[..., None, None], stride=layer.stride)
            update = F.conv2d(shrunk, lora_b[..., None, None], bias)
        else:
            update = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b, bias)
        y = y + update * layer.adapters[name].scaling
    return y.to(dtype)


def adapter_parameters(layer: LoRALayer) -> list[nn.Parameter]:
    tables = (layer.lora_a, layer.lora_b, layer.lora_bias)
    return [parameter for table in tables for parameter in table.values()]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all that the state dict holds."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit, NaN included."""
    after = module.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(bits(value), bits(after[key])), key


def bits(tensor: Tensor) -> Tensor:
    """torchao's tensors have those of what they stand for."""
    if type(tensor) not in (Tensor, nn.Parameter):
        tensor = tensor.dequantize()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])
