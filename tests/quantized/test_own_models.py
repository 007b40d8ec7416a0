"""Models with quantised layers and adapters of this package: applied, explained, trained, moved."""

import copy
from contextlib import nullcontext

import pytest
import torch
from format_helpers import needs, plain_linear
from helpers import BF16, F32
from own_helpers import FEW, HEIGHT, KINDS, WIDTH, Net, adapted, base, gradients, make_x
from torch import nn

import lora_ext
from lora_ext import (
    AdapterPool,
    LoraConfig,
    autotune,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unload,
)
from lora_ext.models import mark_only_lora_as_trainable, trainable_parameters
from lora_ext.nn import LoRALinear, LoRAQuantizedLinear


@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_unload(kind):
    """All linear layers get the adapter; without, the model is what it was."""
    model, x = Net(kind), make_x()
    classes, y = {n: type(m) for n, m in model.named_modules()}, model(x)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    adapted(model)
    kinds = {name: type(getattr(model, name)) for name in ("up", "other", "down")}
    assert kinds["down"] is LoRALinear and kinds["up"] is kinds["other"]
    assert issubclass(kinds["up"], LoRAQuantizedLinear) and issubclass(kinds["up"], classes["up"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    assert not torch.equal(model(x), y)
    with disable_adapter(model):
        assert torch.equal(model(x), y)
    unload(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p is weights[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), y)


def test_a_layer_that_cannot_be_adapted_leaves_the_model_alone():
    pytest.importorskip("bitsandbytes")
    model = Net("nf4")
    model.other.forward = model.other.forward
    with pytest.raises(ValueError, match=r"forward was replaced.*at 'other'"):
        lora_ext.apply_lora(model, LoraConfig("all-linear"))
    assert type(model.up) is type(base("nf4"))
    model.odd = type("Other", (type(model.up),), {})(WIDTH, WIDTH)  # which may compute otherwise
    with pytest.raises(
        ValueError, match=r"'odd' names 'odd', .*a quantised linear layer that lora"
    ):
        lora_ext.apply_lora(model, LoraConfig("odd"))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind):
    """By name, before any layer is changed; without an adapter to merge there is nothing to."""
    model = adapted(Net(kind))
    y = model(make_x())
    for function in (merge_adapter, merge_and_unload):
        with pytest.raises(RuntimeError, match=r"expected a dense weight .* it is quantised"):
            function(model)
    assert not any(layer.merged for _, layer in lora_ext.models.lora_layers(model))
    assert torch.equal(model(make_x()), y)
    set_adapter(model, ())
    merge_and_unload(model)
    assert type(model.up) is type(base(kind)) and type(model.down) is nn.Linear


@pytest.mark.parametrize("kind", [p for p in FEW if p.id != "hqq"])
def test_biases_are_trained_if_asked(kind):
    model, x = Net(kind), make_x()
    lora_ext.apply_lora(model, LoraConfig(["up"], r=4, bias="lora_only"))
    found = gradients(model, x)
    assert "up.bias" in found and "other.bias" not in found
    mark_only_lora_as_trainable(model)
    assert not model.up.bias.requires_grad


def test_a_bias_that_is_no_parameter_stays_as_it_is():
    """HQQ keeps a copy."""
    pytest.importorskip("hqq")
    model = Net("hqq")
    lora_ext.apply_lora(model, LoraConfig(["up"], r=4, bias="lora_only"))
    assert not model.up.bias.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "up.lora_a.default",
        "up.lora_b.default",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_parameters(kind):
    """Packed weights count as the elements that they stand for."""
    count = trainable_parameters(adapted(Net(kind), r=4))
    dense = trainable_parameters(adapted(Net("dense"), r=4))
    assert count.trainable == dense.trainable and count.adapters == dense.adapters
    # HQQ's biases are no parameters; FP8Linear has a scale for each block.
    extra = {"hqq": -2 * HEIGHT, "fp8": 2 * (HEIGHT // 16) * (WIDTH // 16)}.get(kind, 0)
    assert count.total == dense.total + extra


@pytest.mark.parametrize("kind", FEW)
def test_explain(kind):
    model = adapted(Net(kind, BF16))
    found = lora_ext.explain(model)
    by_name = {layer.name: layer for layer in found}
    size = {"int8": 4, "gguf": 4}.get(kind, 2) * HEIGHT * WIDTH
    assert by_name["up"].path == by_name["other"].path == "fused"
    assert by_name["up"].workspace_bytes == found.workspace_bytes == size
    assert by_name["down"].workspace_bytes == 0
    assert by_name["up"].kind == f"LoRA{'Torchao' if kind == 'torchao' else ''}" + (
        "Linear" if kind == "torchao" else type(base(kind)).__name__
    )
    mib = f"{size / 2**20:.3g} MiB"
    assert f"dequantised into {mib}" in by_name["up"].reason
    assert str(found).endswith(f"memory to dequantise: {mib}, shared by 2 layers")
    assert "dequantise" not in str(lora_ext.explain(adapted(Net("dense"))))


@pytest.mark.parametrize("kind", FEW)
def test_shapes_to_warm_up(kind):
    """A GPU has the kernels of the dequantised weight: the layer's sizes, not the packed ones."""
    shapes = autotune.shapes_of(adapted(Net(kind), r=4), 16)
    sizes = {(shape.in_features, shape.out_features, shape.rank) for shape in shapes}
    assert sizes == {(WIDTH, HEIGHT, 4), (HEIGHT, WIDTH, 4)}


@pytest.mark.parametrize("kind", [p for p in KINDS if p.id in ("nf4", "int8")])
def test_a_model_that_is_quantised_after_it_has_adapters(kind):
    """bitsandbytes quantises where a model is moved to a device."""
    import bitsandbytes

    if kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(WIDTH, HEIGHT, quant_type="nf4", compute_dtype=F32)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(WIDTH, HEIGHT, has_fp16_weights=False)
    layer.load_state_dict(plain_linear(HEIGHT, WIDTH).state_dict())
    model = nn.Sequential(layer)
    lora_ext.apply_lora(model, LoraConfig("all-linear", r=4))
    assert model[0].path() == ("added", "its weight is not quantised yet")
    model.to("cpu")
    assert model[0].path()[0] == "fused"
    torch.testing.assert_close(model(make_x()), base(kind)(make_x()), rtol=1e-5, atol=1e-4)


@needs("torchao")
@pytest.mark.parametrize("names", [None, ["default"] * 20], ids=["one", "rows"])
def test_torchao_after_apply_lora_is_refused(names):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(plain_linear(HEIGHT, WIDTH))
    lora_ext.apply_lora(model, LoraConfig("0", r=4))
    quantize_(model, Int8WeightOnlyConfig())
    rows = nullcontext() if names is None else lora_ext.use_adapters(model, names)
    with rows, pytest.raises(TypeError, match=r"torchao put a Int8Tensor .*before apply_lora"):
        model(make_x())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [p for p in KINDS if p.id in ("nf4", "int8")])
def test_a_model_of_transformers(kind, tmp_path, monkeypatch):
    """Loaded quantised, trained under checkpointing, generating, saved, loaded and unloaded."""
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    words |= {"bnb_4bit_compute_dtype": BF16}
    quantization = transformers.BitsAndBytesConfig(
        **(words if kind == "nf4" else {"load_in_8bit": True})
    )

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=quantization, dtype=BF16, device_map="cpu"
        )

    model, ids = load(), torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(1))
    config = LoraConfig("all-linear", r=8, lora_alpha=16, lora_dropout=0.05)
    # On a CPU with AVX512_BF16 bitsandbytes packs nested scales in eval, and rounds them anew when
    # it unpacks them to train: the model that is trained is not evaluated before.
    with torch.no_grad():
        plain = load()(ids).logits
        assert torch.equal(lora_ext.apply_lora(load(), config)(ids).logits, plain)
    lora_ext.apply_lora(model, config)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    found = lora_ext.explain(model)
    assert len(found) == 14 and {layer.path for layer in found} == {"fused"}
    assert found.workspace_bytes == 64 * 128 * (2 if kind == "nf4" else 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    model.gradient_checkpointing_disable()
    with torch.inference_mode():
        trained = model(ids).logits
        assert model.generate(ids[:, :4], max_new_tokens=3).shape == (4, 7)
        with lora_ext.use_adapters(model, ["default", None, None, "default"]):
            assert model.generate(ids[:, :4], max_new_tokens=3).shape == (4, 7)
    lora_ext.save_adapter(model, tmp_path / "adapter")
    other = lora_ext.load_adapter(load(), tmp_path / "adapter")
    with torch.inference_mode():
        assert torch.equal(other(ids).logits, trained)
    model.save_pretrained(tmp_path / "whole")
    unload(model)
    assert type(model.model.layers[0].mlp.up_proj) is type(base(kind))


@pytest.mark.parametrize("kind", FEW)
def test_moving_and_casting(kind):
    """Adapters follow; the base does what it does alone."""
    model, plain = adapted(Net(kind)), Net(kind)
    before = model.up.stored_weight.dtype
    model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    assert model.up.lora_a["default"].dtype == BF16
    assert model.up.stored_weight.dtype == before or kind == "torchao"
    x = make_x(BF16 if kind != "hqq" else F32)
    with disable_adapter(model):
        assert torch.equal(model.up(x), plain.up(x))


# ---- pools ----

NAMES = ["a", None, "b", "a", "b", None]


@pytest.mark.parametrize("kind", FEW)
def test_a_pool(kind, tmp_path):
    """Served without gradients from the slots, trained from their views, as adapters of the model
    itself."""
    model, x = Net(kind), make_x(lead=(6, 12))
    wanted_model = adapted(adapted(Net(kind), "a"), "b", r=4, lora_alpha=3.0)
    for name in ("a", "b"):
        lora_ext.save_adapter(wanted_model, tmp_path / name, name)
    pool = AdapterPool(model, capacity=3, max_rank=8)
    assert len(pool.layers) == 3 and isinstance(model.up, LoRAQuantizedLinear)
    plain = Net(kind)(x)
    assert torch.equal(model(x), plain)
    for name in ("a", "b"):
        pool.add_adapter(name, tmp_path / name)
    pool.add_adapter("new", LoraConfig("all-linear", r=2))
    for mode in (True, False):
        model.train(mode)
        wanted_model.train(mode)
        with lora_ext.use_adapters(wanted_model, NAMES):
            wanted = wanted_model(x)
        with lora_ext.use_adapters(model, NAMES):
            found = model(x)
            with torch.no_grad():
                served = model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-3)
    with lora_ext.use_adapters(model, ["new"] * 6):
        model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in pool.parameters("new"))
    pool.save_adapter("b", tmp_path / "out")
    again = lora_ext.load_adapter(Net(kind), tmp_path / "out")
    assert torch.equal(again.up.lora_a["default"], model.up.pool.slots["b"][0])
    pool.delete_adapter("a")
    assert copy.deepcopy(model).up.pool is not model.up.pool
    unload(model)
    assert type(model.up) is type(base(kind)) and not hasattr(model.up, "pool")
