"""Bases that are more than a plain layer: quantised ones of each library, and experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peft
import pytest
import quantized_models as models
import torch
from expert_helpers import KINDS, both, make_experts
from format_helpers import plain_linear
from helpers import BF16, F32, F64
from mixture_helpers import mixture, some_ids
from quantised_experts import two_experts
from torch import Tensor, nn

from lora_ext.quantized.layers import QuantizedBase, quantized_base

WIDTH, HEIGHT = 64, 128

# Name -> (maker of a frozen linear layer, module that it needs, whether PEFT has layers for it).
QUANTISED: dict[str, tuple[Callable[..., nn.Module], str, bool]] = {
    "nf4": (models.bnb_four_bits, "bitsandbytes", True),
    "fp4": (partial(models.bnb_four_bits, kind="fp4"), "bitsandbytes", True),
    "nf4 plain scales": (partial(models.bnb_four_bits, nested=False), "bitsandbytes", True),
    "int8": (models.bnb_eight_bits, "bitsandbytes", True),
    "torchao": (models.torchao_int8, "torchao", True),
    "torchao int4": (models.torchao_int4_groups, "torchao", True),
    "hqq": (partial(models.hqq_four_bits, optimize=False), "hqq", True),
    "gguf": (models.gguf_eight_bits, "transformers.integrations.gguf.utils", False),
    "fp8": (models.fp8, "transformers.integrations.finegrained_fp8", False),
    "fp8 codes": (models.fp8_codes, "transformers.integrations.finegrained_fp8", False),
}
FEW = [name for name in QUANTISED if name not in ("fp4", "nf4 plain scales", "fp8")]
# Name -> kind of experts, or form of quantised ones.
DENSE = {
    f"experts, {kind}": kind
    for kind in ("plain", "transposed, biases, interleaved", "no gate", "norm")
}
PACKED = {
    "experts, nf4": "nf4",
    "experts, straddling nf4": "straddling",
    "experts, torchao with points": "stand-in points",
    "experts, torchao int8": "int8",
    "experts, mxfp4": "mxfp4",
}
# Name -> a language model with experts, and its dtype.
MIXTURES = {"mixture of gpt_oss": ("gpt_oss", F32), "mixture of qwen3": ("qwen3_moe", BF16)}
EXPERTS = (*DENSE, *PACKED, *MIXTURES)


class Routed(nn.Module):
    """Each row has two of its first three experts, by its own numbers."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        # A graph can have it, where the experts are transformers' own.
        experts.config._experts_implementation = "batched_mm"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        index = rows.detach()[:, :3].argsort(-1)[:, :2]
        return self.experts(rows, index, rows[:, :2].sigmoid()).view_as(x)


class Logits(nn.Module):
    """Of a language model, which takes ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


@cache
def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def is_there(name: str, is_pefts: bool) -> bool:
    """Whether there is such a base, for PEFT's layers or for ours; older transformers lack some."""
    if name in QUANTISED:
        _, module, has_peft = QUANTISED[name]
        return _imports(module) and (has_peft or not is_pefts)
    if name in DENSE:
        model, _ = KINDS[DENSE[name]]
        return _imports(f"transformers.models.{model}")
    return name in MIXTURES or (
        name in PACKED and _imports("torchao" if name == "experts, torchao int8" else "torch")
    )


def has(name: str, adapters: str, is_pefts: bool) -> bool:
    """PEFT takes a second adapter on experts in 4 bits for one without targets, 0.19.0 on any."""
    if adapters == "lora_bias":
        return name in QUANTISED and not (is_pefts and name in ("torchao", "torchao int4", "hqq"))
    one = (*PACKED, *MIXTURES, *(DENSE if is_pefts and peft.__version__ == "0.19.0" else ()))
    return adapters == "one" or (adapters == "three" and name not in one)


def has_float64(name: str) -> bool:
    return name in ("int8", "hqq", "gguf") or name not in (*QUANTISED, *PACKED)


def weight_of(layer: nn.Module, x: Tensor, kind: type | None = None) -> Tensor:
    """W ``[out, in]`` in float64, as a quantised layer has it for x; kind: that of its base."""
    found = quantized_base(layer, x, kind)
    assert isinstance(found, QuantizedBase), found
    return found.weight.dequantize(found.dtype).double()


def dense(
    layer: Any, name: str, of: torch.dtype, kind: type | None = None, dtype: torch.dtype = F64
) -> nn.Linear:
    """A quantised layer as a dense one, of the numbers that it multiplies an x in `of` by."""
    weight = weight_of(layer, make_x(name, of, 1), kind)
    made = nn.Linear(WIDTH, HEIGHT, dtype=dtype).requires_grad_(False)
    made.weight.copy_(weight)
    made.bias.copy_(layer.bias)
    return made


def has_dense_weight(name: str) -> bool:
    """In which a merged adapter has a place."""
    return name not in (*QUANTISED, *PACKED)


def can_be_pickled(name: str) -> bool:
    """torchao gives its layers a method that cannot, torch refuses parametrizations and writes
    8-bit floats in a form that it does not read."""
    return "torchao" not in name and name != "fp8 codes" and name not in PACKED


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A model of the base alone, and the paths of what gets adapters, of experts their weights."""
    if dtype == F64 and not has_float64(name):
        pytest.skip("its library has no float64")
    torch.manual_seed(1)
    if name in MIXTURES:
        model = Logits(mixture(*MIXTURES[name]))
        return model, ["experts.gate_up_proj", "experts.down_proj", "q_proj"]
    if name in EXPERTS:
        if name in DENSE:
            experts = make_experts(DENSE[name], 3, (WIDTH, 96)).to(dtype)
        else:
            experts = two_experts(form=PACKED[name], dtype=dtype)[0]
        model = Routed(experts)
        return model, [f"experts.{each}" for each in both(model.experts)]
    base = QUANTISED[name][0](plain_linear(HEIGHT, WIDTH), dtype).requires_grad_(False)
    model = nn.Sequential(base)
    # By which PEFT knows what it has before it.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "f" in name and "4" in name, name == "int8"
    return model, ["0"]


def make_x(name: str, dtype: torch.dtype, rows: int) -> Tensor:
    if name in MIXTURES:
        return some_ids(shape=(rows, 7))
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, WIDTH, generator=generator, dtype=F64).to(dtype)
