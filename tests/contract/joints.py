"""The joints of features: kinds of layer, and what changes before a forward; how one runs is in
`joint_ways`. A cell of `test_joints` names one of each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from expert_helpers import SmallConfig, make_experts
from helpers import F32, F64
from peft import LoraConfig, get_peft_model
from peft_helpers import randomize
from quantized_models import gguf_eight_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ext
from contract.accelerated import PEFT, PeftSubject
from contract.bases import Routed
from contract.ours import OURS, OurSubject
from contract.row_helpers import Names
from contract.subject import Subject
from lora_ext import AdapterPool, apply_lora

IN, OUT = 6, 8
BLOCK = 32  # of GGUF's Q8_0
ADAPTERS = {"a": (2, 3.0), "b": (3, -2.0), "c": (1, 4.0)}  # rank, alpha
NAMES = ["a", None, "c", "b", "a", "c"]
OTHERS = ["a", "c", "c", "b", None, "b"]  # in the same order: a graph need not be made again
# The names of a forward's block, and those of the block that is open in its backward.
DROPOUT = 0.4
CALLS: list[tuple[Names | None, Names | None]] = [(NAMES, None), (OTHERS, ["c"] * 6), (None, NAMES)]


class Router(nn.Module):
    """Its logits and weights."""

    def __init__(self) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        super().__init__()
        self.gate = Qwen3MoeTopKRouter(SmallConfig(3, (IN, 4)))
        nn.init.normal_(self.gate.weight)
        self.experts = make_experts("plain", 3, (IN, 4))  # a router has some

    def forward(self, x: Tensor) -> Tensor:
        logits, weights, _ = self.gate(x.flatten(0, 1))
        return torch.cat([logits, weights], -1).view(*x.shape[:2], -1)


# ---- kinds of layer ----

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "packed": lambda: nn.Linear(40, 70),
    "conv1d": lambda: Conv1D(OUT, IN),
    "embedding": lambda: nn.Embedding(12, OUT),
    "conv2d": lambda: nn.Conv2d(IN, OUT, 1),
    "quantised": lambda: gguf_eight_bits(nn.Linear(BLOCK, OUT), F64),
    "saved": lambda: nn.Linear(IN, OUT),
    "router": Router,
    "experts": lambda: Routed(make_experts("plain", 3, (IN, 4))),
}


# What comes behind: a module to save; one that PEFT's convolution has beside it, to be accelerated.
BEHIND = {"saved": lambda: nn.Linear(OUT, OUT), "conv2d": lambda: nn.Linear(2, 2)}


def dtype_of(kind: str) -> torch.dtype:
    return F32 if "packed" in kind else F64


def make(kind: str, dropout: float = 0.0) -> Subject:
    """A model of one layer with three adapters, of random values; biases are trained."""
    family, _, layer = kind.partition(" ")
    torch.manual_seed(1)
    made = [one[layer]() for one in (BASES, BEHIND) if layer in one]
    subject = adapted(family, nn.Sequential(*made).to(dtype_of(kind)), [*ADAPTERS], layer, dropout)
    for name, parameter in subject.model.named_parameters():
        if name.endswith("bias") and parameter.is_floating_point():
            parameter.requires_grad_(layer != "packed")
    return subject


def adapted(
    family: str, base: nn.Module, names: list[str], layer: str = "linear", dropout: float = 0.0
) -> Subject:
    """The base's model of a family, with random adapters."""
    model = (_of_peft if family == "peft" else _ours)(base, names, layer, dropout, family == "pool")
    randomize(model)
    for number, parameter in enumerate(of_pool(model).values()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    subject, of = (PeftSubject, PEFT) if family == "peft" else (OurSubject, OURS)
    return subject(of, f"{family} {layer}", model.train())


def _targets(layer: str) -> list[str]:
    own = {"experts": ["experts"], "router": ["gate"], "conv2d": ["0", "1"], "two": ["0", "2"]}
    return own.get(layer, ["0"])


def our_config(layer: str, name: str, dropout: float, r: int | None = None) -> lora_ext.LoraConfig:
    rank, alpha = ADAPTERS[name]
    return lora_ext.LoraConfig(_targets(layer), r=r or rank, lora_alpha=alpha, lora_dropout=dropout)


def our_dtype(layer: str) -> torch.dtype | None:
    return None if layer == "packed" else F64


def peft_config(layer: str, name: str, dropout: float, r: int | None = None) -> LoraConfig:
    rank, alpha = ADAPTERS[name]
    words: dict[str, Any] = {"target_modules": _targets(layer), "lora_dropout": dropout}
    if layer in ("experts", "router"):
        own = {"experts": ["experts.gate_up_proj", "experts.down_proj"], "router": ["gate.weight"]}
        words = {"target_modules": [], "target_parameters": own[layer]}
    words |= {"modules_to_save": ["1"]} if layer == "saved" else {}
    # This init writes the base's weight.
    words |= {"init_lora_weights": "olora"} if r and layer == "packed" else {}
    return LoraConfig(r=r or rank, lora_alpha=alpha, **words)


def _ours(base: nn.Module, names: list[str], layer: str, dropout: float, in_pool: bool):
    pool = AdapterPool(base, 4, 3, _targets(layer), adapter_dtype=F64) if in_pool else None
    for name in names:
        config = our_config(layer, name, dropout)
        if pool is None:
            apply_lora(base, config, name, adapter_dtype=our_dtype(layer))
        else:
            pool.add_adapter(name, config)
    if pool is None:
        lora_ext.set_adapter(base, names)
    return base


def _of_peft(base: nn.Module, names: list[str], layer: str, dropout: float, _: bool):
    configs = {name: peft_config(layer, name, dropout) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = {"autocast_adapter_dtype": False}
        model = get_peft_model(base, configs[names[0]], names[0], **words)
        for name in names[1:]:
            model.add_adapter(name, configs[name], **words)
    model.base_model.set_adapter(["a"] if layer == "saved" else names)
    return lora_ext.accelerate(model, expert_dropout=dropout if layer == "experts" else None)


def of_pool(model: nn.Module) -> dict[str, nn.Parameter]:
    try:
        pool = AdapterPool.of(model)
    except ValueError:
        return {}
    return {f"{name} {key}": p for name in pool for key, p in pool.tensors(name).items()}


def weights(subject: Subject) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, value) of the layer's frozen weights."""
    dims = (3,) if subject.name.endswith("experts") else (2, 4)
    return [
        (module, name, value)
        for path, module in subject.model.named_modules()
        if "lora_" not in path and "modules_to_save" not in path
        for name, value in module._parameters.items()
        if value is not None and value.dim() in dims
    ]


def x_of(subject: Subject, dtype: torch.dtype) -> Tensor:
    """Six samples of four tokens."""
    layer = subject.name.partition(" ")[2]
    generator = torch.Generator().manual_seed(2)
    if layer == "embedding":
        return torch.randint(12, (6, 4), generator=generator)
    width = {"packed": 40, "quantised": BLOCK}.get(layer, IN)
    shape = (6, width, 2, 2) if layer == "conv2d" else (6, 4, width)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def block(subject: Subject, names: Names | None) -> AbstractContextManager[Any]:
    return lora_ext.use_adapters(subject.model, names) if names else nullcontext()


KINDS = [f"ours {layer}" for layer in BASES if layer != "saved"]
KINDS += [f"pool {layer}" for layer in ("linear", "experts")]
KINDS += [f"peft {layer}" for layer in BASES if layer != "quantised"]


# ---- what changes ----


def _rolled(value: Tensor) -> Tensor:
    """Other values, which quantised codes may have as well."""
    return value.detach().roll(1, 1 if value.dim() == 3 else 0)


def switched(subject: Subject) -> None:
    subject.set_adapter(["b"] if subject.name == "peft saved" else ["c", "b"])


def replaced(subject: Subject) -> None:
    """By one of another rank."""
    layer = subject.name.partition(" ")[2]
    active = max(subject.active(), key=len)
    torch.manual_seed(5)
    if subject.name.startswith("pool"):
        AdapterPool.of(subject.model).replace_adapter("b", our_config(layer, "b", 0.0, r=1))
    else:
        subject.delete("b")
        add(subject, "b", r=1)
        subject.set_adapter(list(active))


def add(subject: Subject, name: str, r: int | None = None) -> None:
    """An adapter of random values."""
    family, _, layer = subject.name.partition(" ")
    if family == "peft":
        config = peft_config(layer, name, 0.0, r)
        subject.model.add_adapter(name, config, autocast_adapter_dtype=False)
    else:
        config = our_config(layer, name, 0.0, r)
        apply_lora(subject.model, config, name, adapter_dtype=our_dtype(layer))
    for key, parameter in subject.model.named_parameters():
        if name in key.split(".") and "lora_b" in key.lower():
            nn.init.normal_(parameter, std=0.3)


def merged(subject: Subject) -> Callable[[], Any]:
    subject.merge()
    return subject.unmerge


@torch.no_grad()
def written(subject: Subject) -> None:
    for _, _, value in weights(subject):
        value.copy_(_rolled(value))


def written_data(subject: Subject) -> None:
    for _, _, value in weights(subject):
        value.data = _rolled(value)


def cast(subject: Subject) -> Callable[[], Any]:
    own = dtype_of(subject.name)
    subject.model.to(F32 if own == F64 else F64)
    return lambda: subject.model.to(own)


def dropped(subject: Subject, mode: bool = True) -> None:
    if subject.name == "peft experts":  # by what makes them drop
        lora_ext.accelerate(subject.model, expert_dropout=DROPOUT * mode)
    else:
        subject.model.train(mode)


def moved(subject: Subject) -> None:
    state = copy.deepcopy(subject.model.state_dict())
    subject.model.to("meta").to_empty(device="cpu").load_state_dict(state)


def tied(subject: Subject) -> Callable[[], Any]:
    """To parameters of another module, which then writes them."""
    others = [nn.Parameter(_rolled(value), False) for *_, value in weights(subject)]
    for (module, name, _), other in zip(weights(subject), others, strict=True):
        setattr(module, name, other)
    return lambda: [other.copy_(_rolled(other)) for other in others]


CHANGES: dict[str, Callable[[Subject], Any]] = {
    "switched": switched,
    "replaced": replaced,
    "merged": merged,
    "written": written,
    "written by data": written_data,
    "cast": cast,
    "moved": moved,
    "tied": tied,
    "dropout on": dropped,
    "dropout off": partial(dropped, mode=False),
    "written before backward": lambda subject: None,  # later
}
