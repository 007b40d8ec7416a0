"""Accelerated layers over quantised bases: bitsandbytes in 4 and 8 bits, torchao; real wheels.

Where a package is not installed its cases are skipped; a stand-in with a base of packed bytes that
only its own forward can read is always tested.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import hooks
from format_helpers import needs
from helpers import BF16, F32, max_error, short
from peft import LoraConfig, get_peft_model
from peft_helpers import accelerated, paths, randomize, reasons, step
from quantized_models import bnb_eight_bits, bnb_four_bits, hqq_four_bits, torchao_int8
from torch import Tensor, nn

import lora_ext
from benchmarks.memory import peak_bytes

WIDTH, HEIGHT = 128, 192
WORDS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "dropout": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.2},
    "lora_bias": {"r": 8, "lora_alpha": 16, "lora_bias": True},
}


class Packed(nn.Module):
    """A linear layer in 8 bits per row, quantised symmetrically: a stand-in for others' layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


def library_model(make, words, dtype):
    torch.manual_seed(0)
    holder = nn.Sequential(make(nn.Linear(WIDTH, HEIGHT), dtype))
    holder.is_loaded_in_4bit = make is bnb_four_bits
    holder.is_loaded_in_8bit = make is bnb_eight_bits
    return wrapped(holder, words)


def stand_in_model(words, dtype):
    torch.manual_seed(0)
    holder = wrapped(nn.Sequential(nn.Linear(WIDTH, HEIGHT)).to(dtype), words)
    layer = holder.base_model.model[0]
    layer.base_layer = Packed(layer.base_layer)
    return holder


def wrapped(holder, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomize(get_peft_model(holder, LoraConfig(target_modules=["0"], **words)))


LIBRARIES = {
    "bnb 4 bits": (bnb_four_bits, "bitsandbytes"),
    "bnb 8 bits": (bnb_eight_bits, "bitsandbytes"),
    "torchao": (torchao_int8, "torchao"),
    "hqq": (hqq_four_bits, "hqq"),
}
MODELS = {"stand-in": stand_in_model}
MODELS |= {kind: partial(library_model, make) for kind, (make, _) in LIBRARIES.items()}
KINDS = ["stand-in"]
KINDS += [pytest.param(kind, marks=needs(package)) for kind, (_, package) in LIBRARIES.items()]


def make_x(dtype, rows=60):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_attached_after_accelerate_calls_our_forward(kind, monkeypatch):
    calls, model, x = [], MODELS[kind](WORDS["plain"], F32), make_x(F32)
    theirs = type(model.base_model.model[0])
    real, wanted = theirs.forward, lora_ext.accelerate(model)(x)
    monkeypatch.setattr(
        theirs, "forward", lambda *args, **words: calls.append(1) or real(*args, **words)
    )
    hooks.add_hook_to_module(model.base_model.model[0], hooks.ModelHook())
    assert torch.equal(model(x), wanted) and calls == []
    lora_ext.decelerate(model)(x)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_pefts(kind):
    if kind == "stand-in":
        pytest.skip("PEFT cannot merge into it")
    model = MODELS[kind](WORDS["plain"], F32)
    if kind == "torchao":
        model.base_model.model[0].get_apply_tensor_subclass = None
        with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
            lora_ext.accelerate(model).merge_adapter()
        return
    fast, x = accelerated(model), make_x(F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast.merge_adapter()
        model.merge_adapter()
    assert set(paths(fast).values()) == {"base"}
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_dora(kind, dtype, dropout):
    if kind in ("torchao", "stand-in"):
        pytest.skip("PEFT cannot initialise it")
    words = {"r": 4, "use_dora": True, "lora_dropout": dropout}
    model = MODELS[kind](words, dtype)
    fast, x = accelerated(model), make_x(dtype)
    assert set(paths(fast).values()) == {"added"}
    if dropout:  # y is linear in drop(x), so the mean over masks is y without one
        torch.manual_seed(0)
        draws = torch.stack([fast(x[:2]).detach().float() for _ in range(600)])
        spread = draws.std(0) / len(draws) ** 0.5
        for module in fast.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        rounding = 1e-5 if dtype == F32 else 1e-2
        assert ((draws.mean(0) - fast(x[:2]).float()).abs() <= 5.5 * spread + rounding).all()
        return
    found, wanted = step(fast, x), step(model, x)
    for name, value in wanted.items():
        limit = (1e-5 if dtype == F32 else 2e-2) * value.abs().max().item()
        assert max_error(found[name], value.double()) <= limit, name


@pytest.mark.parametrize("kind", ["bnb 8 bits"])
def test_dora_on_a_base_that_is_called_is_pefts(kind):
    pytest.importorskip("bitsandbytes")
    model = MODELS[kind]({"r": 4, "use_dora": True}, F32)
    fast = accelerated(model).eval()
    assert reasons(fast) == {("peft", "in eval it quantises x, too")}
    assert torch.equal(fast(make_x(F32)), model.eval()(make_x(F32)))


@pytest.mark.parametrize("words", ["plain", "dropout"])
def test_no_full_size_temporaries(words):
    """Beside the base's own, a step holds what the blocks hold; PEFT's default holds several
    float32 copies of x and of the output."""
    peaks = []
    for change in (accelerated, lambda model: model):
        model = change(stand_in_model(WORDS[words], BF16))
        x = make_x(BF16, 16384).requires_grad_()
        grad = torch.ones(16384, HEIGHT, dtype=BF16)

        def run(model=model, x=x, grad=grad):
            model(x).backward(grad)

        run()
        peaks.append(peak_bytes(run))
    y, dx = 2 * 16384 * HEIGHT, 2 * 16384 * WIDTH
    blocks = 6 * 2**20 + 16384 * 8 * 4
    # y of the base and of the layer, then dx twice while autograd adds the two.
    assert peaks[0] <= 2 * y + 2 * dx + blocks
    assert peaks[1] >= 1.4 * peaks[0]


@pytest.mark.parametrize("words", WORDS)
def test_rows_with_adapters_of_their_own_on_a_base_that_is_called(words):
    """The base runs once, and only its own forward reads it."""
    torch.manual_seed(0)
    options = {**WORDS[words], "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, HEIGHT)), LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**{**options, "r": 4}))
    randomize(model)
    layer = lora_ext.accelerate(model).base_model.model[0]
    packed = layer.base_layer = Packed(layer.base_layer)
    model.eval()
    x = torch.randn(4, 3, WIDTH)
    names = ["a", None, "b", "a"]
    wanted = lora_ext.decelerate(copy.deepcopy(model))(
        x, adapter_names=[name or "__base__" for name in names]
    )
    packed.calls = 0
    with lora_ext.use_adapters(model, names):
        found = model(x)
        assert paths(model) == {"0": "added"}
    assert packed.calls == 1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@needs("bitsandbytes")
def test_explain_counts_the_workspace(dora):
    """Of what is dequantised for the op or for DoRA; of layers that are called there is none."""
    words = WORDS["plain"] | {"use_dora": dora}
    model = lora_ext.accelerate(MODELS["bnb 4 bits"](words, BF16))
    found = lora_ext.explain(model)
    assert found.workspace_bytes == WIDTH * HEIGHT * 2
    assert str(found).endswith("MiB, shared by 1 layers")
    with model.disable_adapter():
        assert lora_ext.explain(model).workspace_bytes == 0
    assert lora_ext.explain(lora_ext.decelerate(model)).workspace_bytes == 0
    called = lora_ext.accelerate(MODELS["bnb 8 bits"](WORDS["plain"], BF16)).eval()
    assert lora_ext.explain(called).workspace_bytes == 0
