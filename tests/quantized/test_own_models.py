"""Models with quantised layers and adapters of this package: applied, saved, served, taken out."""

import copy
from contextlib import nullcontext

import pytest
import torch
from format_helpers import needs, plain_linear
from helpers import BF16, F32
from own_helpers import (
    FEW,
    HEIGHT,
    KINDS,
    OF_PEFT,
    WIDTH,
    Net,
    adapted,
    base,
    gradients,
    make_grad,
    make_x,
    same,
)
from peft import PeftModel
from torch import nn

import lora_ext
from lora_ext import AdapterPool, LoRAConfig, autotune
from lora_ext.models import (
    delete_adapter,
    disable_adapters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge,
    merge_and_unload,
    set_adapter,
    trainable_parameters,
    unload,
)
from lora_ext.nn import LoRALinear, LoRAQuantizedLinear


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


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
    with disable_adapters(model):
        assert torch.equal(model(x), y)
    unload(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p is weights[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", FEW)
def test_patterns(kind):
    model = Net(kind)
    lora_ext.apply_lora(model, LoRAConfig(["up", "re:d.*"], r=4, rank_pattern={"up": 2}))
    assert {p.name for p in lora_ext.explain(model)} == {"up", "down"}
    assert model.up.adapters["default"].r == 2
    assert type(model.other) is type(base(kind))
    with pytest.raises(ValueError, match="expected a new adapter's name"):
        lora_ext.apply_lora(model, LoRAConfig("other"))
    lora_ext.apply_lora(model, LoRAConfig("*", r=4), "second")
    assert list(model.other.adapters) == ["second"] and model.other.active_adapters == ()
    set_adapter(model, "second")
    assert model.up.active_adapters == ("second",)
    delete_adapter(model, "second")
    assert list(model.up.adapters) == ["default"] and not model.other.adapters


def test_a_layer_that_cannot_be_adapted_leaves_the_model_alone():
    pytest.importorskip("bitsandbytes")
    model = Net("nf4")
    model.other.forward = model.other.forward
    with pytest.raises(ValueError, match=r"replaced on the instance.*at 'other'"):
        lora_ext.apply_lora(model, LoRAConfig("all-linear"))
    assert type(model.up) is type(base("nf4"))
    model.odd = type("Other", (type(model.up),), {})(WIDTH, WIDTH)  # which may compute otherwise
    with pytest.raises(ValueError, match=r"'odd' names 'odd', .*a quantised linear layer that is"):
        lora_ext.apply_lora(model, LoRAConfig("odd"))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind):
    """By name, before any layer is changed; without an adapter to merge there is nothing to."""
    model = adapted(Net(kind))
    y = model(make_x())
    for function in (merge, merge_and_unload):
        with pytest.raises(RuntimeError, match=r"expected a dense weight .* it is quantised"):
            function(model)
    assert not any(layer.merged for _, layer in lora_ext.models.lora_layers(model))
    assert torch.equal(model(make_x()), y)
    set_adapter(model, ())
    merge_and_unload(model)
    assert type(model.up) is type(base(kind)) and type(model.down) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    """The base's entries are those that it has alone; adapters come beside them."""
    model = Net(kind)
    plain = state(model)
    adapted(model)
    own = {n for n, p in model.named_parameters() if "lora_" in n}
    found = model.state_dict()
    assert set(found) == set(plain) | own and len(own) == 6
    assert all(same(found[name], value) for name, value in plain.items())
    assert set(lora_state_dict(model)) == own
    prefixed = nn.ModuleDict({"a": model}).state_dict(prefix="b.")
    assert set(prefixed) == {f"b.a.{name}" for name in found}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_back(kind):
    """Of the adapters alone, and of the whole where the base alone takes its own."""
    model, other, x = adapted(Net(kind)), adapted(Net(kind)), make_x()
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    y = model(x)
    missing, unexpected = other.load_state_dict(lora_state_dict(model), strict=False)[:2]
    assert torch.equal(other(x), y)
    assert not unexpected and not any("lora_" in name for name in missing)
    if kind.startswith(("nf4", "fp4")):
        # It has no entry for what describes its weight, with adapters or without.
        for one in (model, Net(kind)):
            with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.weight\.absmax"):
                one.load_state_dict(state(one))
        return
    other = adapted(Net(kind))
    nn.init.zeros_(other.up.lora_b["default"])
    other.load_state_dict(state(model))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, x = adapted(Net(kind), use_rslora=True, rank_pattern={"up": 3}), make_x()
    lora_ext.save_adapter(model, tmp_path / "a")
    other = lora_ext.load_adapter(Net(kind), tmp_path / "a")
    assert isinstance(other.up, LoRAQuantizedLinear) and other.up.lora_a["default"].shape[0] == 3
    assert torch.equal(other(x), model(x))
    lora_ext.load_adapter(other, tmp_path / "a", "again", trainable=True)
    assert other.up.active_adapters == ("default",)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_of_the_weight_is_saved_as_plain_lora(init, tmp_path):
    """With W kept it is one; a folder that says so of another weight is refused."""
    pytest.importorskip("bitsandbytes")
    model, x = adapted(Net("nf4"), init=init, r=4), make_x()
    lora_ext.save_adapter(model, tmp_path / "a")
    other = lora_ext.load_adapter(Net("nf4"), tmp_path / "a")
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-3)
    config = tmp_path / "a" / "adapter_config.json"
    text = config.read_text()
    assert '"init_lora_weights": true' in text
    config.write_text(text.replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    refused = f"'up', which is quantised, but got .*{init}"
    with pytest.raises(lora_ext.adapters.AdapterError, match=refused):
        lora_ext.load_adapter(Net("nf4"), tmp_path / "a")


@pytest.mark.parametrize("kind", OF_PEFT)
def test_pefts_folder_in_and_out(kind, tmp_path):
    model, x = adapted(Net(kind, BF16)), make_x(BF16)
    lora_ext.save_adapter(model, tmp_path / "ours")
    plain = Net(kind, BF16)
    plain.is_loaded_in_4bit = "4bit" in type(plain.up).__name__
    plain.is_loaded_in_8bit = "8bit" in type(plain.up).__name__
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True)
    y = model(x)
    assert (theirs(x) - y).abs().max() <= 2e-2 * y.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    other = lora_ext.load_adapter(Net(kind, BF16), tmp_path / "theirs")
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", [p for p in FEW if p.id != "hqq"])
def test_biases_are_trained_if_asked(kind):
    model, x = Net(kind), make_x()
    lora_ext.apply_lora(model, LoRAConfig(["up"], r=4, bias="lora_only"))
    found = gradients(model, x)
    assert "up.bias" in found and "other.bias" not in found
    torch.testing.assert_close(found["up.bias"], _bias_gradient(model, x), rtol=1e-4, atol=1e-4)
    mark_only_lora_as_trainable(model)
    assert not model.up.bias.requires_grad


def _bias_gradient(model, x):
    """By automatic differentiation of the sum after the layer."""
    shift = torch.zeros(model.up.out_features, requires_grad=True)
    y = model.down(torch.tanh(model.up(x).detach() + shift) + model.other(x).detach())
    y.backward(make_grad(y))
    return shift.grad


def test_a_bias_that_is_no_parameter_stays_as_it_is():
    """HQQ keeps a copy."""
    pytest.importorskip("hqq")
    model = Net("hqq")
    lora_ext.apply_lora(model, LoRAConfig(["up"], r=4, bias="lora_only"))
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
    assert f"through a workspace of {mib}" in by_name["up"].reason
    assert str(found).endswith(f"workspace: {mib}, shared by 2 layers, one at a time")
    assert "workspace" not in str(lora_ext.explain(adapted(Net("dense"))))


@pytest.mark.parametrize("kind", FEW)
def test_shapes_to_warm_up(kind):
    """A GPU has the kernels of the dequantised weight: the layer's sizes, not the packed ones."""
    shapes = autotune.shapes_of(adapted(Net(kind), r=4), 16)
    sizes = {(shape.in_features, shape.out_features, shape.rank) for shape in shapes}
    assert sizes == {(WIDTH, HEIGHT, 4), (HEIGHT, WIDTH, 4)}


NAMES = ["a", None, "b", "a", "b", None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", FEW)
def test_rows_with_adapters_of_their_own(kind, training):
    """y and gradients of a mixed batch are those of its samples in turn."""
    model = adapted(Net(kind), "a")
    adapted(model, "b", r=4, alpha=3.0)
    model.train(training)
    x = make_x(lead=(6, 12))
    wanted = []
    for row, name in enumerate(NAMES):
        set_adapter(model, () if name is None else name)
        wanted.append(model(x[row : row + 1]))
    set_adapter(model, ["a", "b"])
    with lora_ext.use_adapters(model, NAMES):
        found = model(x)
        kinds = {layer.path for layer in lora_ext.explain(model)}
    if training:
        assert kinds == {"fused"}
    else:  # int8 is called, nf4 where bitsandbytes has a kernel for this processor
        assert "fused" in kinds and kinds <= {"fused", "added"}
        assert kind != "int8" or "added" in kinds
    if training or kind != "int8":  # whose x is quantised by its largest element, of all rows
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-3)
    found.square().sum().backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(own) == 12
    model.zero_grad()
    torch.cat(wanted).square().sum().backward()
    if training or kind != "int8":
        for name, parameter in model.named_parameters():
            if name in own:
                scale = own[name].abs().max().item()
                torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", FEW)
def test_a_pool(kind, tmp_path):
    """Served without gradients from the slots, trained from their views, as adapters of the model
    itself."""
    model, x = Net(kind), make_x(lead=(6, 12))
    wanted_model = adapted(adapted(Net(kind), "a"), "b", r=4, alpha=3.0)
    for name in ("a", "b"):
        lora_ext.save_adapter(wanted_model, tmp_path / name, name)
    pool = AdapterPool(model, capacity=3, max_rank=8)
    assert len(pool.layers) == 3 and isinstance(model.up, LoRAQuantizedLinear)
    plain = Net(kind)(x)
    assert torch.equal(model(x), plain)
    for name in ("a", "b"):
        pool.add(name, tmp_path / name)
    pool.add("new", LoRAConfig("all-linear", r=2))
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
    pool.save("b", tmp_path / "out")
    again = lora_ext.load_adapter(Net(kind), tmp_path / "out")
    assert torch.equal(again.up.lora_a["default"], model.up.pool.slots["b"][0])
    pool.remove("a")
    assert copy.deepcopy(model).up.pool is not model.up.pool
    unload(model)
    assert type(model.up) is type(base(kind)) and not hasattr(model.up, "pool")


@pytest.mark.parametrize("kind", FEW)
def test_compiled_rows(kind):
    """Of adapters of the model with gradients, and of a pool without."""
    x = make_x(lead=(6, 12))
    torch._dynamo.reset()
    model = adapted(adapted(Net(kind), "a"), "b", r=4)
    set_adapter(model, ["a", "b"])
    with lora_ext.use_adapters(model, NAMES):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-3)
    found.sum().backward()
    assert model.up.lora_a["b"].grad is not None
    model = Net(kind).eval()
    pool = AdapterPool(model, capacity=2, max_rank=8)
    pool.add("a", LoRAConfig("all-linear", r=4))
    for parameter in pool.parameters("a"):
        nn.init.normal_(parameter)
    torch._dynamo.reset()
    with lora_ext.use_adapters(model, ["a", None] * 3), torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-2)


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
    lora_ext.apply_lora(model, LoRAConfig("all-linear", r=4))
    assert model[0].path() == ("added", "its weight is not quantised yet")
    model.to("cpu")
    assert model[0].path()[0] == "fused"
    assert torch.equal(model(make_x()), base(kind)(make_x()))


@needs("torchao")
@pytest.mark.parametrize("names", [None, ["default"] * 20], ids=["one", "rows"])
def test_torchao_after_apply_lora_is_refused(names):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(plain_linear(HEIGHT, WIDTH))
    lora_ext.apply_lora(model, LoRAConfig("0", r=4))
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
    with torch.no_grad():
        plain = model(ids).logits
    lora_ext.apply_lora(model, LoRAConfig("all-linear", r=8, alpha=16, dropout=0.05))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
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
    with disable_adapters(model):
        assert torch.equal(model.up(x), plain.up(x))
