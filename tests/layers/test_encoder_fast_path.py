"""torch's fused encoder layer reads weights itself and calls no module: adapters must not be lost.

`torch.nn.TransformerEncoderLayer.forward` takes that path in eval mode where nothing it reads wants
a gradient: frozen models with adapters are such.
"""

import copy

import pytest
import torch
from helpers import by_torch_save
from layer_helpers import randomize
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoRALinear, apply_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def make_encoder(layers=2, **words):
    torch.manual_seed(1)
    words = {"dim_feedforward": 24, "dropout": 0.1, "batch_first": True, **words}
    layer = nn.TransformerEncoderLayer(16, 2, **words)
    return nn.TransformerEncoder(layer, layers).double().eval()


def make_x():
    return torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def plainly(encoder, x, **words):
    """By the modules, without any of torch's fast paths."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return encoder(x, **words)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def fused_layers(encoder, x, **words):
    """How many layers went through the fused op."""
    with torch.profiler.profile() as trace, torch.no_grad():
        encoder(x, **words)
    return sum(e.count for e in trace.key_averages() if "_transformer_encoder_layer_fwd" in e.key)


def test_the_fast_path_is_what_these_tests_are_about():
    assert fused_layers(make_encoder(), make_x()) == 2


PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()


# Gradients with padding in eval mode are refused by torch's attention, adapters or not.
@pytest.mark.parametrize(
    ("padding", "gradients"),
    [(None, False), (None, True), (PADDING, False)],
    ids=["full", "gradients", "padded"],
)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("targets", [["linear1"], ["linear1", "linear2"], ["layers.1.linear2"]])
def test_adapters_are_not_skipped(targets, merged, gradients, padding):
    """With padding the encoder hands nested tensors to its layers."""
    encoder, x = make_encoder(), make_x()
    randomize(apply_lora(encoder, LoraConfig(targets, 3)))
    if merged:
        lora_ext.merge_adapter(encoder)
    words = {} if padding is None else {"src_key_padding_mask": padding}
    with torch.set_grad_enabled(gradients):
        y, wanted = encoder(x, **words), plainly(encoder, x, **words)
        with lora_ext.disable_adapter(encoder):
            base = plainly(encoder, x, **words)
    kept = slice(None) if padding is None else ~padding
    assert torch.allclose(y[kept], wanted[kept], atol=1e-10)
    assert not torch.allclose(y[kept], base[kept], atol=1e-3)
    if gradients and not merged:
        y.sum().backward()
        assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_layers_without_adapters_keep_the_fast_path():
    encoder = make_encoder(3)
    apply_lora(encoder, LoraConfig("layers.1.linear1"))
    assert fused_layers(encoder, make_x()) == 2


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), torch.tanh])
@pytest.mark.parametrize("function", [lora_ext.unload, lora_ext.merge_and_unload])
def test_the_fast_path_comes_back(function, activation):
    encoder, x = make_encoder(activation=activation), make_x()
    layer = encoder.layers[0]
    before, attributes = fused_layers(encoder, x), dict(layer.__dict__)
    assert before == (0 if activation is torch.tanh else 2)
    for _ in range(2):
        apply_lora(encoder, LoraConfig(["linear1", "linear2"]), "a")
        apply_lora(encoder, LoraConfig(["linear1"]), "b")
        assert fused_layers(encoder, x) == 0
        lora_ext.delete_adapter(encoder, "a")
        lora_ext.merge_adapter(encoder)
        assert fused_layers(encoder, x) == 0
        function(encoder)
        assert fused_layers(encoder, x) == before
    assert layer.__dict__.keys() == attributes.keys()
    assert layer.activation_relu_or_gelu == attributes["activation_relu_or_gelu"]


def test_layers_put_in_by_hand():
    encoder, x = make_encoder(), make_x()
    encoder.layers[0].linear1 = randomize(LoRALinear.from_linear(encoder.layers[0].linear1))
    with torch.no_grad():
        assert torch.allclose(encoder(x), plainly(encoder, x), atol=1e-10)
    assert fused_layers(encoder, x) == 1


def test_copies_keep_the_guard():
    encoder, x = make_encoder(), make_x()
    randomize(apply_lora(encoder, LoraConfig("linear1")))
    wanted = plainly(encoder, x)
    for other in (copy.deepcopy(encoder), by_torch_save(encoder)):
        with torch.no_grad():
            assert torch.allclose(other(x), wanted, atol=1e-10)
        assert fused_layers(other, x) == 0
        assert fused_layers(lora_ext.unload(other), x) == 2


def test_training_goes_by_the_modules():
    encoder, x = make_encoder().train(), make_x()
    randomize(apply_lora(encoder, LoraConfig("linear1", lora_dropout=0.5)))
    encoder(x, src_key_padding_mask=PADDING).sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)
