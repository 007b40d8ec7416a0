"""Small PEFT models over layers of the libraries that quantise."""

import importlib
import importlib.util
import logging
import warnings

import pytest
import torch
from helpers import F32
from peft import LoraConfig, get_peft_model
from peft_helpers import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN = 64, 128


def bnb_four_bits(
    layer: nn.Linear, dtype: torch.dtype, storage=torch.uint8, kind="nf4", nested=True
) -> nn.Module:
    import bitsandbytes as bnb

    words = {"quant_type": kind, "compute_dtype": dtype, "quant_storage": storage}
    words["compress_statistics"] = nested
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **words)
    made.load_state_dict(layer.state_dict())
    made.weight.data = made.weight.data.to(dtype)  # before it is quantised
    made.bias.data = made.bias.data.to(dtype)
    return nn.Sequential(made).to("cpu")[0]


def bnb_eight_bits(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    # On each call it says that it rounds x to float16, in eval mode.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    made.bias.data = made.bias.data.to(dtype)
    return nn.Sequential(made).to("cpu")[0]


def gguf_eight_bits(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    utils = pytest.importorskip("transformers.integrations.gguf.utils")  # not in 5.16
    dequant = importlib.import_module("transformers.integrations.gguf.dequant")
    kinds = {name: number for number, name in dequant.GGML_NAME.items()}
    made = utils.GgufLinear(layer.in_features, layer.out_features, kinds["Q8_0"], True)
    weight = layer.weight.detach().float().view(layer.out_features, -1, 32)
    scale = (weight.abs().amax(-1, keepdim=True) / 127).half()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    blocks = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], -1)
    made.weight.data = blocks.view(layer.out_features, -1)
    made.bias.data = layer.bias.detach().clone()
    # The first call of many rows looks for kernels and logs that there are none: no graph may.
    made(torch.zeros(64, layer.in_features))
    return made


def torchao_int8(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer).to(dtype)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0].requires_grad_(False)


def torchao_int4_groups(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Sequential(layer).to(dtype)
    quantize_(holder, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return holder[0].requires_grad_(False)


def hqq_four_bits(layer: nn.Linear, dtype: torch.dtype, optimize=True) -> nn.Module:
    """optimize: looks for better zeros, for long."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    config["weight_quant_params"]["optimize"] = optimize
    layer = layer.requires_grad_(False)
    return HQQLinear(layer, config, compute_dtype=dtype, device="cpu", initialize=True)


def fp8(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """With the weight as a checkpoint that is not quantised leaves it."""
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    made = module.FP8Linear(layer.in_features, layer.out_features, block_size=(16, 16))
    made.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    made.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True))
    nn.init.ones_(made.weight_scale_inv)  # as it is made, it may be NaN, which equals nothing
    return made


def fp8_codes(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """e4m3 with a scale for each 16 x 16."""
    made = fp8(layer, dtype)
    rows, columns = made.weight_scale_inv.shape
    made.weight_scale_inv.data = torch.linspace(0.5, 2, rows * columns).view(rows, columns)
    made.weight.data = made.weight.data.to(torch.float8_e4m3fn)
    return made


MAKERS = {
    "bnb nf4": (bnb_four_bits, "bitsandbytes"),
    "bnb int8": (bnb_eight_bits, "bitsandbytes"),
    "torchao int8": (torchao_int8, "torchao"),
    "torchao int4": (torchao_int4_groups, "torchao"),
    "hqq": (hqq_four_bits, "hqq"),
}


def is_installed(kind: str) -> bool:
    return importlib.util.find_spec(MAKERS[kind][1]) is not None


KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not is_installed(kind), reason="not installed"))
    for kind in MAKERS
]


class Block(nn.Module):
    def __init__(self, make, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = make(nn.Linear(WIDTH, HIDDEN), dtype)
        self.down = make(nn.Linear(HIDDEN, WIDTH), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Net(nn.Module):
    """Two blocks of two quantised layers.

    Attributes:
        reentrant: which kind of checkpoint each block is under, None for none.
    """

    def __init__(self, make, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(make, dtype), Block(make, dtype)])
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def quantized_net(kind: str, dtype: torch.dtype = F32, make=None, **words) -> nn.Module:
    """PEFT's model of such a net, adapters in all layers, of values as after some training."""
    torch.manual_seed(0)
    net = Net(make or MAKERS[kind][0], dtype)
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "bnb nf4", kind == "bnb int8"
    words = {"r": 4, "lora_alpha": 1, "target_modules": ["up", "down"], **words}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomize(get_peft_model(net, LoraConfig(**words)))


def make_x(dtype: torch.dtype = F32, rows: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, WIDTH, generator=generator).to(dtype)
