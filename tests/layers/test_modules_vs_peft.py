"""The layers beside real PEFT with the same tensors: sums by torch, and inits.

Of one call, `contract/test_numerics` compares outputs and gradients with PEFT's operations, and
`adapters/test_adapters` outputs with those of PEFT's folders; `models/test_apply` has configs.
"""

import copy
import warnings

import pytest
import torch
from helpers import BF16, F32, max_error, rms_error, short
from layer_helpers import exact, randomize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext import apply_lora
from lora_ext.models import lora_layers

HEIGHT = 40
MAKERS = {
    "linear": lambda: nn.Linear(24, HEIGHT),
    "conv1d": lambda: Conv1D(HEIGHT, 24),
    "embedding": lambda: nn.Embedding(50, HEIGHT, padding_idx=3),
    "conv2d": lambda: nn.Conv2d(24, HEIGHT, 1),
}


def make_x(dtype, rows=60):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


def peft_of(model, adapters, **options):
    """PEFT's model on a copy, with the adapters {name: words of LoraConfig}, all active."""
    names = list(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model)
        configs = {name: LoraConfig(**words) for name, words in adapters.items()}
        peft = get_peft_model(base, configs[names[0]], names[0], **options)
        for name in names[1:]:
            peft.add_adapter(name, configs[name], **options)
        peft.base_model.set_adapter(names)
    return peft


def ours_of(model, adapters, adapter_dtype=None):
    """The same by apply_lora on another copy."""
    model = copy.deepcopy(model)
    for name, words in adapters.items():
        apply_lora(model, LoraConfig(**words), name, adapter_dtype=adapter_dtype)
    lora_ext.set_adapter(model, list(adapters))
    return randomize(model)


@torch.no_grad()
def give_factors(ours, peft):
    """Writes our factors into PEFT's layers."""
    theirs = {path: m for path, m in peft.base_model.model.named_modules() if is_peft(m)}
    for path, layer in lora_layers(ours):
        for name in layer.adapters:
            pairs = peft_tensors(theirs[path], name)
            for table, target in pairs.items():
                target.copy_(getattr(layer, table)[name].reshape(target.shape))
    assert theirs.keys() == dict(lora_layers(ours)).keys()


def is_peft(module):
    return isinstance(module, LoraLayer)


def peft_tensors(layer, name):
    if name in layer.lora_embedding_A:
        pair = (layer.lora_embedding_A[name], layer.lora_embedding_B[name])
        return dict(zip(("lora_a", "lora_b"), pair, strict=True))
    a, b = layer.lora_A[name], layer.lora_B[name]
    found = {"lora_a": a.weight, "lora_b": b.weight}
    return found if b.bias is None else {**found, "lora_bias": b.bias}


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ("dtype", "adapters 'a' and 'b' differ in dtype: added by torch"),
        ("dropout", "adapters 'a' and 'b' differ in dropout: added by torch"),
        ("rank", "more than 512"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_same_bits_where_torch_adds(dtype, different, reason):
    """Adapters that one call cannot hold are added in PEFT's order, bit for bit."""
    words = {
        "a": {"r": 4, "lora_alpha": 6.0, "target_modules": ["0"]},
        "b": {"r": 3, "lora_alpha": 5.0, "target_modules": ["0"]},
    }
    if different == "dropout":
        words["b"]["lora_dropout"] = 0.5
    if different == "rank":
        words["b"]["r"] = 510
    model = nn.Sequential(nn.Linear(24, HEIGHT)).to(dtype)
    ours, peft = ours_of(model, words), peft_of(model, words)
    if different == "dtype":
        for table in (ours[0].lora_a, ours[0].lora_b):
            table["b"].data = table["b"].data.to(BF16)
        peft.base_model.model[0].lora_A["b"].to(BF16)
        peft.base_model.model[0].lora_B["b"].to(BF16)
    give_factors(ours, peft)
    assert ours[0].path()[0] == "added" and reason in ours[0].path()[1]
    outputs = []
    for m in (ours, peft):
        torch.manual_seed(11)  # the same dropout mask
        outputs.append(m(make_x(dtype)))
    assert torch.equal(*outputs)


# ---- inits ----


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_first_values_are_distributed_as_pefts(kind, init):
    words = {"r": 64, "lora_alpha": 6.0, "target_modules": ["0"]}
    model = nn.Sequential(MAKERS[kind]())
    peft = peft_of(model, {"a": {**words, "init_lora_weights": init}})
    config = lora_ext.LoraConfig("0", 64, 6.0, init_lora_weights=init)
    ours = apply_lora(copy.deepcopy(model), config, "a")
    for table, theirs in peft_tensors(peft.base_model.model[0], "a").items():
        value = getattr(ours[0], table)["a"]
        assert value.std().item() == pytest.approx(theirs.std().item(), rel=0.1), table
        assert value.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.4), table


def with_init(init, dtype):
    """(the plain model, ours, PEFT's), after the same step from PEFT's factors."""
    words = {"r": 4, "lora_alpha": 6.0, "target_modules": ["0"]}
    model = nn.Sequential(nn.Linear(24, HEIGHT)).to(dtype)
    peft = peft_of(model, {"a": {**words, "init_lora_weights": init}})
    config = lora_ext.LoraConfig("0", 4, 6.0, init_lora_weights=init)
    ours = apply_lora(copy.deepcopy(model), config, "a")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for table, theirs in peft_tensors(peft.base_model.model[0], "a").items():
            value = getattr(ours[0], table)["a"]
            assert value.dtype == theirs.dtype == F32
            if init is True:
                value.copy_(theirs)
            tolerance = 1e-4 if dtype == F32 else 1e-2  # PEFT rounds the factors to bfloat16
            torch.testing.assert_close(value, theirs, rtol=tolerance, atol=tolerance)
            step = 0.1 * torch.randn(theirs.shape, generator=generator)
            value += step
            theirs += step
    return model, ours, peft


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_pissa_and_olora_are_pefts_function(init, dtype):
    """PEFT trains on W - s B0 A0, we on W + s (B A - B0 A0)."""
    model, ours, peft = with_init(init, dtype)
    assert torch.equal(ours[0].weight, model[0].weight)
    x = make_x(dtype, 400)
    with torch.no_grad():
        y, theirs, wanted = ours(x), peft(x), exact(ours[0], x)
    # Sums of 28 terms differ by some units of the last place with the library that makes them.
    floor = 8 * torch.finfo(F32).eps * wanted.abs().max().item()
    assert max_error(y, wanted) <= 2 * max_error(theirs, wanted) + floor
    if dtype == F32:
        torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-4)
    else:  # PEFT rounds W - s B0 A0 to bfloat16 once more
        assert rms_error(y, wanted) <= 0.9 * rms_error(theirs, wanted)


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_merging_gives_pefts_weight(init):
    _, ours, peft = with_init(init, F32)
    merged, theirs = lora_ext.merge_and_unload(ours), peft.merge_and_unload()
    assert type(merged[0]) is type(theirs[0]) is nn.Linear
    torch.testing.assert_close(merged[0].weight, theirs[0].weight, rtol=1e-5, atol=1e-5)
