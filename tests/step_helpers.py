"""Layers by name, a training step of each, and the comparison of two steps bit for bit."""

from functools import partial

import torch
import torch.nn.functional as F
from helpers import BF16
from layer_helpers import randomize
from torch import nn

from lora_ext import LoraConfig, LoRALinear, apply_lora
from lora_ext.nn import AdapterSpec, LoRAMergedLinear

IN, OUT = 16, 24


def under_autocast(module, device):
    """module(x) in a region of autocast to bfloat16."""

    def region(x):
        with torch.autocast(device, BF16):
            return module(x)

    return region


def compiled_under_autocast(module, device, backend, inside):
    """With the region inside the graph, or around the compiled module."""
    compiled = partial(torch.compile, backend=backend, fullgraph=True)
    if inside:
        return compiled(under_autocast(module, device))
    return under_autocast(compiled(module), device)


def linear(dropout=0.0, **options):
    return randomize(LoRALinear(IN, OUT, r=3, lora_alpha=6, lora_dropout=dropout, **options))


def several(dropout=0.0, alphas=(6, 4), dropouts=None):
    """Three active adapters of different ranks."""
    layer = LoRALinear(IN, OUT, r=3, lora_alpha=6, lora_dropout=dropout)
    others = zip(("second", "third"), (2, 4), alphas, dropouts or (dropout, dropout), strict=True)
    for name, rank, alpha, p in others:
        layer.add_adapter(name, AdapterSpec(rank, alpha, p))
    layer.set_adapter(["default", "second", "third"])
    return randomize(layer)


def merged(dropout=0.0, **options):
    layer = linear(dropout, **options).eval()
    layer.merge()
    return layer


class Disabled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with self.layer.disable_adapter():
            return self.layer(x)


def disabled(dropout=0.0):
    return Disabled(linear(dropout))


def none_active(dropout=0.0):
    layer = linear(dropout)
    layer.set_adapter(())
    return layer


def projections(dropout=0.0):
    layer = LoRAMergedLinear(IN, OUT, r=0)
    layer.enable_groups([True, False, True])
    layer.add_adapter("default", AdapterSpec(2, 4, dropout))
    return randomize(layer)


def adapted(module, dropout=0.0, **options):
    holder = nn.Sequential(module)
    return randomize(
        apply_lora(holder, LoraConfig("0", r=3, lora_alpha=6, lora_dropout=dropout, **options))
    )


def convolution(dropout=0.0, **options):
    return adapted(nn.Conv2d(IN, OUT, 1, **options), dropout)


def embedding(dropout=0.0):
    return adapted(nn.Embedding(11, IN, padding_idx=2), dropout)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Block(nn.Module):
    """A transformer block over token ids, with adapters in all seven of its layers."""

    def __init__(self, width=IN, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids):
        x = self.embed(ids)
        normed = self.norm_1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def block(dropout=0.0):
    names = ["embed", "q", "k", "v", "o", "up", "down"]
    model = apply_lora(
        Block(), LoraConfig(names, r=3, lora_alpha=6, lora_dropout=dropout, bias="all")
    )
    return randomize(model)


ROWS = (60, IN)
IMAGES = (2, IN, 4, 6)
# name -> (how to make it from dropout, the shape of x or None for token ids)
LAYERS = {
    "linear": (linear, ROWS),
    "batch": (linear, (2, 3, 10, IN)),
    "one row": (linear, (IN,)),
    "lora_bias": (partial(linear, lora_bias=True), ROWS),
    "no bias": (partial(linear, bias=False), ROWS),
    "pissa": (partial(linear, init_lora_weights="pissa"), ROWS),
    "olora": (partial(linear, init_lora_weights="olora"), ROWS),
    "several": (several, ROWS),
    "several, one scaling": (partial(several, alphas=(4, 8)), ROWS),
    "several, other dropout": (partial(several, dropouts=(0.0, 0.6)), ROWS),
    "projections": (projections, ROWS),
    "merged": (merged, ROWS),
    "merged lora_bias": (partial(merged, lora_bias=True), ROWS),
    "disabled": (disabled, ROWS),
    "none active": (none_active, ROWS),
    "convolution": (convolution, IMAGES),
    "strided convolution": (partial(convolution, stride=2), IMAGES),
    "embedding": (embedding, None),
    "block": (block, None),
}
UNTRAINED = ("merged", "merged lora_bias", "disabled", "none active")


def make(name, dropout, device="cpu"):
    """(module, x)"""
    factory, shape = LAYERS[name]
    module = factory(dropout).to(device)
    if shape is None:
        return module, torch.randint(11, (3, 7), device=device)
    return module, torch.randn(shape, dtype=next(module.parameters()).dtype, device=device)


def run(function, module, x, wants_dx=True, seed=7):
    """A step of function, which calls module: name -> y, dx and the gradients; None if none.

    Gradients of a loss that is not linear, so that they depend on y.
    """
    module.zero_grad()
    x = x.detach().clone()
    if wants_dx and x.is_floating_point():
        x.requires_grad_()
    torch.manual_seed(seed)
    y = function(x)
    if y.requires_grad:
        y.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def differing(first, second):
    """Names of what is not the same bit for bit."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not same_bits(value, second[name])]


def same_bits(value, other):
    if value is None or other is None:
        return value is other
    return value.dtype == other.dtype and torch.equal(value, other)


def assert_same(first, second):
    assert differing(first, second) == []


def adapter_gradients(result):
    return {name: value for name, value in result.items() if name.endswith(".default")}


def assert_trained(result):
    """The gradients of the adapters are there and not zero: what is compared with them says
    something."""
    for name, value in adapter_gradients(result).items():
        if "_init" not in name:
            assert value is not None and value.abs().max() > 0, name
