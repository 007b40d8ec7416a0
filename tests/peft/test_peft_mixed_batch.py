"""PEFT's adapter_names on accelerated models: the same results, one call, and in training too."""

import contextlib
import contextvars
import itertools

import pytest
import torch
import transformers
from contract.accelerated import PEFT
from helpers import BF16, F64
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Conv2d
from peft.tuners.lora.model import LoraModel
from peft_helpers import (
    accelerated,
    layer_model,
    lora_modules,
    make_ids,
    make_x,
    net,
    paths,
    peft_model,
    plain_copy,
    randomize,
    tiny_llama,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_ext

NAMES = ["a", "__base__", "c", "b", "a", "c"]
OF_BLOCK = [None if name == "__base__" else name for name in NAMES]
LINEAR = ["up", "gate", "down"]


def peft_llama(targets=("q_proj", "v_proj", "down_proj"), adapters=("a", "b"), **words):
    options = {"r": 4, "target_modules": list(targets), "task_type": "CAUSAL_LM", **words}
    model = get_peft_model(tiny_llama(), LoraConfig(**options), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**{**options, "r": 3}))
    return randomize(model).eval()


def peft_t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2}
    config = transformers.T5Config(**sizes, num_heads=2, decoder_start_token_id=0)
    base = transformers.T5ForConditionalGeneration(config)
    options = {"r": 4, "target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**options))
    return randomize(model).eval()


def prompts(count=3, tokens=5):
    return torch.randint(3, 40, (count, tokens), generator=torch.Generator().manual_seed(2))


def generated(model, ids, **words):
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **words
        )


def test_decelerate_gives_pefts_behaviour_back():
    model = lora_ext.accelerate(net("three", F64)).train()
    model(make_ids(), adapter_names=NAMES).sum().backward()
    lora_ext.decelerate(model)
    assert type(model.base_model) is LoraModel
    with pytest.raises(ValueError, match="training mode"):
        model(make_ids(), adapter_names=NAMES)
    assert not any("row_adapters" in module.__dict__ for module in model.modules())


def test_errors_are_pefts_own():
    fast = lora_ext.accelerate(net("three", F64)).eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): d, e"):
        fast(make_ids(), adapter_names=["a", "e", "d", "a", "a", "a"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        fast(make_ids(), adapter_names=["a"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        fast(make_ids(12), adapter_names=NAMES)
    fast.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        fast(make_ids(), adapter_names=NAMES)
    fast.unmerge_adapter()
    dora = lora_ext.accelerate(net("dora", F64)).eval()
    with pytest.raises(ValueError, match="DoRA"):
        dora(make_ids(), adapter_names=["a"] * 6)
    with pytest.raises(ValueError, match="variant"), lora_ext.use_adapters(dora, ["a"] * 6):
        dora(make_ids())


def test_an_exception_in_a_forward_leaves_nothing_behind():
    model = lora_ext.accelerate(net("three", F64)).eval()
    wanted = model(make_ids())
    handle = model.base_model.model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(make_ids(), adapter_names=NAMES)
    handle.remove()
    assert torch.equal(model(make_ids()), wanted)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [peft_llama, peft_t5])
def test_generate_with_adapter_names(make, beams):
    """Beams repeat each sample, but not in an encoder."""
    model = make()
    fast = accelerated(model)
    names = ["a", "__base__", "b"]
    wanted = generated(model, prompts(), adapter_names=names, num_beams=beams)
    assert torch.equal(generated(fast, prompts(), adapter_names=names, num_beams=beams), wanted)
    assert not torch.equal(generated(fast, prompts(), num_beams=beams), wanted)


def test_activated_lora_is_an_index_that_starts_at_the_invocation():
    invocation = [7, 8]
    model = peft_llama(adapters=("a",), alora_invocation_tokens=invocation)
    ids = prompts(3, 8)
    ids[0, 3:5] = torch.tensor(invocation)
    ids[1, 6:8] = torch.tensor(invocation)
    ids[2] = 5
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        fast = accelerated(model)
        index = torch.full((3, 8), -1, dtype=torch.int32)
        index[0, 3:] = index[1, 6:] = 0
        with lora_ext.use_adapters(fast, ["a"], index):
            found = fast(input_ids=ids).logits
        with fast.disable_adapter():
            base = fast(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, :3], base[:, :3], rtol=1e-4, atol=1e-5)
    assert (found[0, 3:] - base[0, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_modules_to_save_and_layers_that_are_pefts(training):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)

        def part(self, x):
            return self.head(self.mix(self.conv(x).mean((2, 3)))).tanh()

        def forward(self, x, reentrant=None):
            if reentrant is None:
                return self.part(x)
            return checkpoint(self.part, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    words = {"r": 2, "modules_to_save": ["head"]}
    model = peft_model(Pixels(), {"a": words}, ["conv", "mix"], F64)
    model.add_adapter("b", LoraConfig(target_modules=["conv", "mix"], **words))
    randomize(model, seed=3)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["b"].weight.add_(1.0)
    x = torch.randn(4, 3, 6, 6, dtype=F64)
    names = ["a", "b", "__base__", "b"]
    wanted = model.eval()(x, adapter_names=names).detach()
    fast = accelerated(model).train(training)
    assert isinstance(fast.base_model.model.conv, Conv2d)
    torch.testing.assert_close(fast(x, adapter_names=names), wanted, rtol=1e-10, atol=1e-10)
    own = ["a", "b", None, "b"]
    steps = []  # backward comes after the block
    for reentrant, is_pefts in itertools.product((None, False, True), (False, True)):
        fast.zero_grad()
        x.requires_grad_()
        with contextlib.nullcontext() if is_pefts else lora_ext.use_adapters(fast, own):
            words = {"adapter_names": names} if is_pefts else {}
            y = fast(x, reentrant=reentrant, **words)
        y.square().sum().backward()
        steps.append({n: p.grad for n, p in fast.named_parameters() if p.grad is not None})
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-10, atol=1e-10)
    task, block = contextvars.copy_context(), lora_ext.use_adapters(fast, ["b", "a", "a", None])
    with lora_ext.use_adapters(fast, own):
        task.run(block.__enter__)  # another's, which overlaps
        torch.testing.assert_close(fast(x), wanted, rtol=1e-10, atol=1e-10)
        task.run(block.__exit__, None, None, None)
    with pytest.raises(ValueError, match="index of samples"):
        lora_ext.use_adapters(fast, ["a"], torch.zeros((4, 6), dtype=torch.int32)).__enter__()


def test_a_model_that_is_not_accelerated_is_refused():
    with pytest.raises(ValueError, match="not accelerated"):
        lora_ext.use_adapters(net("three"), ["a"] * 6).__enter__()


CHANGES = {
    "hooks": lambda layer: layer.lora_A["b"].register_forward_hook(lambda *_: None),
    "forward": lambda layer: setattr(layer.lora_A["b"], "forward", layer.lora_A["b"].forward),
    "dropout": lambda layer: layer.lora_dropout.update({"b": nn.AlphaDropout(0.3)}),
    "dtype": lambda layer: layer.lora_A["b"].float(),
    "bias": lambda layer: setattr(layer.lora_A["b"], "bias", nn.Parameter(torch.ones(2).double())),
    "class": lambda layer: setattr(layer.lora_A["b"], "__class__", type("O", (nn.Linear,), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_only_pefts_loop_computes(change):
    """PEFT's loop computes what the op cannot, and explain says so."""
    model = net("three", F64, lora_dropout=0.3).train()
    layer = lora_ext.accelerate(model).base_model.model.up
    CHANGES[change](layer)
    with lora_ext.use_adapters(model, [name.replace("__base__", "a") for name in NAMES]):
        assert paths(model)["up"] == "peft"
    if change == "dtype":
        return
    wanted = plain_copy(model).eval()
    found = model.eval()(make_ids(), adapter_names=NAMES)
    torch.testing.assert_close(found, wanted(make_ids(), adapter_names=NAMES))


# ---- PEFT's argument, and blocks ----


def accelerated_net(adapters="three", *args, **words):
    return lora_ext.accelerate(net(adapters, *args, **words))


def trained(model, forward):
    model.zero_grad()
    y = forward(model)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def by_names(names=NAMES):
    return lambda model: model(make_ids(), adapter_names=names)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "subclass", "hooked"])
@pytest.mark.parametrize("adapters", ["three", "lora_bias of one"])
def test_the_same_outputs_as_pefts(kind, adapters):
    model = PEFT.make(kind, adapters, F64).model.eval()
    x = make_x(kind, F64, 6)
    y = model(x, adapter_names=NAMES)
    torch.testing.assert_close(y, plain_copy(model)(x, adapter_names=NAMES), rtol=1e-11, atol=1e-11)
    with lora_ext.use_adapters(model, OF_BLOCK):
        assert torch.equal(model(x), y)


def test_the_same_list_changed_in_place_is_another_batch():
    model = accelerated_net(targets=LINEAR).eval()
    names = list(NAMES)
    by_names(names)(model)
    names[0] = "b"
    assert torch.equal(by_names(names)(model), by_names(list(names))(model))
    assert not torch.equal(by_names(names)(model), by_names()(model))


# ---- what is left to PEFT, or refused ----


def test_a_hook_on_a_factor_is_called():
    """PEFT computes such a layer, with the names; by token it is refused."""
    model = PEFT.make("linear", "three", F64).model.eval()
    x = make_x("linear", F64, 6)
    (layer,) = lora_modules(model).values()
    seen = []
    layer.lora_A["a"].register_forward_hook(lambda *_: seen.append(1))
    plain = plain_copy(model)(x, adapter_names=NAMES)
    seen.clear()
    with lora_ext.use_adapters(model, OF_BLOCK):
        torch.testing.assert_close(model(x), plain, rtol=1e-11, atol=1e-11)
    assert seen == [1]
    torch.testing.assert_close(model(x, adapter_names=NAMES), plain, rtol=1e-11, atol=1e-11)
    index = torch.zeros(2, 3, dtype=torch.int32)
    with (
        lora_ext.use_adapters(model, ["a"], index),
        pytest.raises(ValueError, match="lora_A, lora_B or lora_dropout has hooks"),
    ):
        model(x.view(2, 3, -1))


def test_a_trained_base_weight_has_its_gradient():
    """The base is called, and the updates are added onto its y."""
    model = PEFT.make("linear", "three", F64).model
    (layer,) = lora_modules(model).values()
    layer.base_layer.weight.requires_grad_(True)
    x = make_x("linear", F64, 6)
    with lora_ext.use_adapters(model, OF_BLOCK):
        found = trained(model, lambda model: model(x))
    plain = plain_copy(model).eval()
    wanted = trained(plain, lambda model: model(x, adapter_names=NAMES))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_base_in_another_dtype_than_x():
    model = PEFT.make("linear", "three", BF16).model.eval()
    x = make_x("linear", F64, 6).float()
    with pytest.raises(RuntimeError), lora_ext.use_adapters(model, OF_BLOCK):
        model(x)


# ---- PEFT's other verbs around it ----


def test_a_layer_alone():
    """Not only whole models of PEFT: a module that holds its layers."""
    model = lora_ext.accelerate(layer_model("linear", "three")).base_model.model
    x = make_x("linear", rows=6)
    with lora_ext.use_adapters(model, OF_BLOCK):
        y = model(x)
    assert y.shape == (6, 40)
