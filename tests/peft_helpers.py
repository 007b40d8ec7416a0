"""PEFT models with random adapters, a step of one, and what must not differ when accelerated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from helpers import F32, F64
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ext

VOCAB, WIDTH, HEIGHT, CLASSES = 30, 24, 40, 5
KINDS = ("linear", "linear without bias", "conv1d", "embedding")
# Paths of `lora_ext.explain` on which the op computes, in whole or in part.
FAST = {"fused", "added", "library"}

# Adapters by a short name: {adapter: words of LoraConfig}.
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {"a": {"r": 4, "lora_alpha": 6}},
    "rslora": {"a": {"r": 4, "lora_alpha": 6, "use_rslora": True}},
    "lora_bias": {"a": {"r": 4, "lora_alpha": 6, "lora_bias": True}},
    "dora": {"a": {"r": 4, "lora_alpha": 6, "use_dora": True}},
    "three": {
        "a": {"r": 4, "lora_alpha": 6},
        "b": {"r": 2, "lora_alpha": -3},
        "c": {"r": 5, "lora_alpha": 5, "use_rslora": True},
    },
}


def make_base(kind: str) -> nn.Module:
    """The module that a kind of layer adapts."""
    makers = {
        "linear": lambda: nn.Linear(WIDTH, HEIGHT),
        "linear without bias": lambda: nn.Linear(WIDTH, HEIGHT, bias=False),
        "conv1d": lambda: Conv1D(HEIGHT, WIDTH),
        "embedding": lambda: nn.Embedding(VOCAB, HEIGHT, padding_idx=3),
    }
    base = makers[kind]()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=WIDTH**-0.5)
    return base


class Net(nn.Module):
    """An embedding, two layers of equal size and a Conv1D; takes token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, HEIGHT), nn.Linear(WIDTH, HEIGHT, bias=False)
        self.down = Conv1D(WIDTH, HEIGHT)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x)) * self.gate(x)))


TARGETS = ["embed", "up", "gate", "down"]


def tiny_llama(**sizes: Any) -> nn.Module:
    """A language model of random weights."""
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small, **sizes}))


def make_ids(rows: int = 6, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))


def make_x(kind: str, dtype: torch.dtype = F32, rows: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "embedding":
        return torch.randint(0, VOCAB, (rows,), generator=generator)
    return torch.randn((rows, WIDTH), generator=generator, dtype=F64).to(dtype)


def peft_model(
    base: nn.Module,
    adapters: Mapping[str, Mapping[str, Any]],
    targets: list[str],
    dtype: torch.dtype = F32,
    half_adapters: bool = False,
    **words: Any,
) -> nn.Module:
    """PEFT's model on base, with all adapters active and random."""
    base = base.to(dtype)
    options = {"autocast_adapter_dtype": not half_adapters}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {
            name: LoraConfig(target_modules=targets, **{**one, **words})
            for name, one in adapters.items()
        }
        first, *others = configs
        model = get_peft_model(base, configs[first], first, **options)
        for name in others:
            model.add_adapter(name, configs[name], **options)
        model.base_model.set_adapter(list(configs))
    return randomize(model)


def layer_model(kind: str, adapters: str = "one", *args: Any, **words: Any) -> nn.Module:
    """A model of one adapted layer."""
    torch.manual_seed(1)
    return peft_model(nn.Sequential(make_base(kind)), ADAPTERS[adapters], ["0"], *args, **words)


def net(adapters: str = "one", *args: Any, **words: Any) -> nn.Module:
    """The net above with adapters in all but its head."""
    torch.manual_seed(1)
    targets = words.pop("targets", TARGETS)
    return peft_model(Net(), ADAPTERS[adapters], targets, *args, **words)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values as after some training in all that PEFT trains; magnitudes stay near their norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            factors = torch.rand(parameter.shape, generator=generator, dtype=F64) + 0.5
            parameter.mul_(factors.to(parameter.dtype))
        elif "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.copy_(0.3 * values)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    return lora_ext.accelerate(copy.deepcopy(model))


def plain_copy(model: nn.Module) -> nn.Module:
    """PEFT's own forward on the same numbers."""
    return lora_ext.decelerate(copy.deepcopy(model))


def exact_model(model: nn.Module) -> nn.Module:
    """PEFT's own forward in float64 on the same numbers."""
    return plain_copy(model).double()


def step(
    model: nn.Module, x: Tensor, seed: int = 7, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """y, dx and the gradients by name, for a dy that does not depend on y, rounded to `dtype`."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    y.backward(grad.to(dtype or y.dtype).to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def paths(model: nn.Module) -> dict[str, str]:
    """Layer -> path of `lora_ext.explain`."""
    prefix = "base_model.model."
    return {layer.name.removeprefix(prefix): layer.path for layer in lora_ext.explain(model)}


def reasons(model: nn.Module) -> set[tuple[str, str]]:
    return {(layer.path, layer.reason) for layer in lora_ext.explain(model)}


def lora_modules(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def assert_same_output(model: nn.Module, other: nn.Module, ids: Tensor | None = None) -> None:
    """Both compute the same in float64."""
    ids = make_ids() if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids), rtol=1e-10, atol=1e-10)


def as_float64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
