"""Small models, one of them with every kind of layer, and PEFT's own adapters on them."""

import copy
import json
import os
import warnings
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext.nn import LoRALayer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Targets in the Zoo below: layers of every kind, and linear ones alone.
EVERYTHING = ["emb", "q_proj", "mlp", "c_attn", "conv"]
LINEAR = ["q_proj", "mlp", "c_attn"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.mlp = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.q_proj(x)))


class Zoo(nn.Module):
    """ids ``[batch, time]`` to logits ``[batch, time, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.c_attn = Conv1D(24, 16)
        self.conv = nn.Conv2d(24, 10, 1)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.c_attn(x)
        x = self.conv(x.movedim(-1, 1)[..., None])[..., 0].movedim(1, -1)
        return self.head(self.norm(x))


class Tree(nn.Module):
    """Linear layers at the given paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            parent = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            parent.add_module(last, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


class Tied(nn.Module):
    """A language model whose first and last layer have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 8)
        self.last = nn.Linear(8, 20, bias=False)
        self.last.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.lin(self.emb(ids))))


def make_zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype).eval()


def make_ids() -> Tensor:
    return torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))


def peft_model(base: nn.Module, **config) -> nn.Module:
    """PEFT's model around a copy of base, with random values in all that it would train."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config)).eval()
    randomize(p for p in model.parameters() if p.requires_grad)
    return model


def from_peft(base: nn.Module, folder) -> nn.Module:
    """What PEFT makes of a folder."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def save_peft(model: nn.Module, folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


@torch.no_grad()
def randomize(parameters) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.3 * noise.to(parameter.dtype))


@torch.no_grad()
def output(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*(inputs or (make_ids(),)))


def read_config(folder) -> dict:
    with open(os.path.join(folder, CONFIG)) as file:
        return json.load(file)


def write_config(folder, table: dict) -> None:
    with open(os.path.join(folder, CONFIG), "w") as file:
        json.dump(table, file)


def read_tensors(folder) -> dict[str, Tensor]:
    return load_file(os.path.join(folder, WEIGHTS))


def state_of(model: nn.Module) -> dict:
    """All that loading could change: structure, values, flags and active adapters."""
    return {
        "types": {path: type(module) for path, module in model.named_modules()},
        "ids": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "active": {
            path: (module.active_adapters, dict(module.adapters))
            for path, module in model.named_modules()
            if isinstance(module, LoRALayer)
        },
        "marks": {
            path: {k: v for k, v in vars(module).items() if k.startswith("lora_ext_")}
            for path, module in model.named_modules()
        },
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    values, old = after.pop("values"), {**before}.pop("values")
    assert after == {key: value for key, value in before.items() if key != "values"}
    assert values.keys() == old.keys()
    for name, tensor in values.items():
        bits = tensor.contiguous().view(torch.uint8), old[name].contiguous().view(torch.uint8)
        assert torch.equal(*bits), name
