"""AdapterPool on mixtures: slots for adapters of experts and routers, against adapters of the model
itself, each alone and many in one batch."""

import copy

import pytest
import torch
from four_bit_experts import make_four_bits, parts_of
from helpers import BF16, F32, by_pickle
from mixture_helpers import edited, loaded_by_peft, logits, mixture, peft_mixture, some_ids
from pool_helpers import assert_same, buffers, own_factors, randomize, slots, values

import lora_ext
from lora_ext import AdapterPool, LoraConfig
from lora_ext.adapters import AdapterError

NAMES = ["a", "b", None, "c", "a"]
ROUTERS = {"qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router"}
DOWN = "model.layers.0.mlp.experts.down_proj"


def on_everything(kind="qwen3_moe"):
    """Adapters of unlike ranks, on unlike layers."""
    return {
        "a": LoraConfig(["all-linear", ROUTERS[kind]], r=3, lora_alpha=6),
        "b": LoraConfig(["experts.down_proj", "q_proj"], r=4, lora_alpha=-3, use_rslora=True),
        "c": LoraConfig("q_proj", r=2),
    }


def on_experts(**words):
    return {
        "a": LoraConfig("experts", r=3, lora_alpha=6, **words),
        "b": LoraConfig("experts.down_proj", r=4, lora_alpha=-3, **words),
        "c": LoraConfig("experts", r=1, **words),
    }


def pool_of(model, configs, targets="experts"):
    """With random values in each adapter."""
    pool = AdapterPool(model, 4, 4, targets)
    for seed, (name, config) in enumerate(configs.items()):
        pool.add_adapter(name, config)
        randomize(pool.parameters(name), seed)
    return pool


def everything(kind="qwen3_moe"):
    return pool_of(mixture(kind), on_everything(kind), ["all-linear", ROUTERS[kind]])


@torch.no_grad()
def twin_of(pool, model, configs):
    """A model with the pool's adapters as its own."""
    for name, config in configs.items():
        lora_ext.apply_lora(model, config, name)
        for key, factor in own_factors(model, name).items():
            factor.copy_(pool.tensors(name)[key])
    return model


def mixed(model, names=NAMES, tokens=4):
    with lora_ext.use_adapters(model, names):
        return model(some_ids(shape=(len(names), tokens))).logits


def gradient_of(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)


def gradients(factors):
    return {key: factor.grad.clone() for key, factor in factors.items() if factor.grad is not None}


def alone(model):
    """(logits, gradients by name) of each adapter on its own samples, active in the model."""
    ids, rows, found = some_ids(shape=(len(NAMES), 4)), [], {}
    for name in NAMES:
        own = torch.tensor([each == name for each in NAMES])
        lora_ext.set_adapter(model, name or [])
        y = model(ids).logits
        rows.append(y.detach()[len(rows)])
        if name is not None:
            model.zero_grad()
            y.backward(gradient_of(y) * own[:, None, None])
            found[name] = gradients(own_factors(model, name))
    return torch.stack(rows), found


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# ---- what it computes ----


@pytest.mark.parametrize("kind", ROUTERS)
def test_each_sample_as_with_its_adapter_alone(kind):
    pool = everything(kind)
    wanted, expected = alone(twin_of(pool, mixture(kind), on_everything(kind)))
    with torch.no_grad():
        assert_close(mixed(pool.model), wanted)
    y = mixed(pool.model)
    assert_close(y.detach(), wanted)
    y.backward(gradient_of(y))
    for name in pool:
        assert pool.tensors(name).keys() == expected[name].keys()
        assert_close(gradients(pool.tensors(name)), expected[name])


def test_the_base_alone():
    pool, base = everything(), mixture()(some_ids(shape=(2, 4))).logits
    assert torch.equal(mixed(pool.model, [None] * 2), base)
    assert torch.equal(pool.model(some_ids(shape=(2, 4))).logits, base)
    reasons = {each.reason for each in lora_ext.explain(pool.model)}
    assert reasons == {"a pool with 3 of 4 slots used, only in blocks of use_adapters"}
    with lora_ext.use_adapters(pool.model, ["a", "b"]):
        paths = {each.name.rpartition(".")[2]: each.path for each in lora_ext.explain(pool.model)}
    assert paths["down_proj"] == "fused" and paths["weight"] == "added"


def quantised(model):
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            for name in ("gate_up_proj", "down_proj"):
                make_four_bits(module, name)
    return model


@pytest.mark.parametrize("tokens", [1, 7])  # of an expert few rows, as in generation, and more
@pytest.mark.parametrize("has_four_bits", [False, True])
def test_the_bits_of_the_same_adapters_of_a_model(has_four_bits, tokens):
    """Forward, gradients and the masks of dropout."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96}
    base = mixture(dtype=BF16, **sizes)
    base, configs = quantised(base) if has_four_bits else base, on_experts(lora_dropout=0.3)
    pool = pool_of(copy.deepcopy(base), configs)
    twin = twin_of(pool, copy.deepcopy(base), configs)
    lora_ext.set_adapter(twin, list(pool))  # so that all are trained
    with torch.no_grad():
        y, wanted = (mixed(model.eval(), tokens=tokens) for model in (pool.model, twin))
    assert torch.equal(y, wanted)
    for model in (pool.model, twin):
        torch.manual_seed(3)
        dropped = mixed(model.train(), tokens=tokens)
        dropped.square().sum().backward()
        assert not torch.equal(dropped, y)
    for name in pool:
        assert_same(gradients(pool.tensors(name)), gradients(own_factors(twin, name)))
    assert not has_four_bits or not any(part.calls for part in parts_of(pool.model))


# ---- add, replace, remove ----


def test_slots_of_each_layer():
    pool = everything()
    assert {path.rpartition("layers.0.")[2] for path in pool.layers if ".0.mlp" in path} == {
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert pool.specs("a")[DOWN].r == 3 and pool.specs("b")[DOWN].r == 4
    assert pool.specs("a")[DOWN.replace("down", "gate_up")].r == 6
    shapes = [list(pool.tensors("a")[f"{DOWN}.lora_{part}"].shape) for part in "ab"]
    assert shapes == [[5 * 3, 12], [16, 3 * 5]]
    assert all(p.is_contiguous() for p in pool.parameters("a") if p.shape[1] == 15)
    assert not any("pool" in key for key in pool.model.state_dict())
    one = AdapterPool(mixture(), 1, 300, "experts").layers[DOWN.replace("down", "gate_up")].pool
    assert one.largest_rank == 512 and one.lora_a.shape == (1, 5 * 512, 16)


def test_lives_of_a_slot(tmp_path):
    """Folders of PEFT and tensors, of unlike ranks, one after the other in the same memory."""
    models = {"all": peft_mixture("qwen3_moe", "all-linear"), "some": peft_mixture(use_rslora=True)}
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder)
    pool = everything()
    before, others = logits(pool.model), values(pool, "b")
    pointers = {key: tensor.data_ptr() for key, tensor in buffers(pool).items()}
    pool.delete_adapter("c")
    pool.add_adapter("x", tmp_path / "all")
    for folder in ("all", "some", "all"):
        pool.replace_adapter("x", tmp_path / folder)
        assert_close(mixed(pool.model, ["x"] * 2, 7), logits(models[folder]))
    pool.save_adapter("x", tmp_path / "again")
    assert_close(logits(loaded_by_peft(mixture(), tmp_path / "again")), logits(models["all"]))
    pool.replace_adapter("x", values(pool, "a"), on_everything()["a"])
    assert torch.equal(mixed(pool.model, ["x", "b"]), mixed(pool.model, ["a", "b"]))
    pool.delete_adapter("x")
    assert pointers == {key: tensor.data_ptr() for key, tensor in buffers(pool).items()}
    assert_same(values(pool, "b"), others)
    assert torch.equal(logits(pool.model), before)


def without(part):
    def change(tensors):
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def cut(tensors):
    """To the factors of four experts."""
    for key in [key for key in tensors if ".0.mlp.experts" in key]:
        value = tensors[key]
        tensors[key] = value[:12] if "lora_A" in key else value[:, :12]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    peft_mixture("qwen3_moe").save_pretrained(tmp_path / "whole")
    peft_mixture("qwen3_moe", "all-linear").save_pretrained(tmp_path / "router")
    pool = pool_of(mixture(), on_experts(), "all-linear")
    before, names = slots(pool), pool.names
    folders = {
        r"1.mlp.experts.lora_B.weight' is missing": without("1.mlp.experts.lora_B"),
        r"lora_B of all that .* lacks .*1.mlp.experts.down_proj'.*1.mlp.experts.gate_up": (
            without("1.mlp.experts")
        ),
        r"0.mlp.experts.base_layer.lora_A.weight.*: expected shape \[15, 16\]": cut,
    }
    cases = {
        message: (edited(tmp_path / "whole", tmp_path / str(i), change),)
        for i, (message, change) in enumerate(folders.items())
    }
    good, config = values(pool, "a"), on_experts()["a"]
    tensors = {f"{DOWN}.lora_{part}": good[f"{DOWN}.lora_{part}"] for part in "ab"}
    odd = tensors | {f"{DOWN}.lora_a": tensors[f"{DOWN}.lora_a"][1:]}
    none = tensors | {f"{DOWN}.lora_a": tensors[f"{DOWN}.lora_a"][:0]}
    infinite = tensors | {f"{DOWN}.lora_b": tensors[f"{DOWN}.lora_b"] / 0}
    cases |= {
        r"pool's layers.*mlp.gate.weight' too": (tmp_path / "router",),
        r"down_proj': expected lora_a of shape \[10, 12\], but got \[14, 12\]": (odd, config),
        r"down_proj': expected lora_a of shape \[5, 12\], but got \[0, 12\]": (none, config),
        r"down_proj': expected finite values in lora_b": (infinite, config),
        r"gate_up_proj': .* most 8, of 2 projections with the pool's max_rank each, but got 10": (
            LoraConfig("experts", r=5),
        ),
        r"down_proj': expected a rank of at most 4, the": (LoraConfig("experts.down_proj", r=5),),
        r"gate_up_proj': expected no lora_bias": (LoraConfig("experts", r=2, lora_bias=True),),
        r"expected init_lora_weights True or": (
            LoraConfig("experts", r=2, init_lora_weights="olora"),
        ),
        r"pool's layers.*mlp.gate' too": (LoraConfig("mlp.gate"),),
    }
    for message, arguments in cases.items():
        with pytest.raises(AdapterError, match=f"'x'.*{message}"):
            pool.add_adapter("x", *arguments)
        assert_same(slots(pool), before)
        assert pool.names == names
    with pytest.raises(AdapterError, match=r"pool's layers.*experts' too"):
        AdapterPool(mixture(), 2, 8, "q_proj").add_adapter("x", LoraConfig("experts"))
    routed = everything()
    with pytest.raises(AdapterError, match=r"mlp.gate.weight': expected dropout 0"):
        routed.add_adapter("x", LoraConfig("mlp.gate", r=2, lora_dropout=0.1))
    with pytest.raises(ValueError, match="a layer that exclude_modules leaves"):
        neither = ["experts.gate_up_proj", "experts.down_proj"]
        AdapterPool(mixture(), 2, 4, "experts", exclude_modules=neither)


# ---- training, removal, copies ----


def test_an_optimizer_of_one_adapter_writes_the_pool_itself():
    pool = pool_of(mixture(dtype=F32), on_experts())
    wanted, before = slots(pool), values(pool, "c")
    optimizer = torch.optim.AdamW(pool.parameters("c"), lr=0.1, fused=True)
    mixed(pool.model).square().mean().backward()
    optimizer.step()
    for key, factor in pool.tensors("c").items():
        assert not torch.equal(factor, before[key])
        slot = wanted[key][pool.slot("c")]  # its first numbers; the rest, and other slots, stay
        slot.view(-1)[: factor.numel()] = factor.detach().flatten()
    assert_same(slots(pool), wanted)


def test_copies_moves_and_adapters_of_the_model():
    model = lora_ext.apply_lora(mixture(), LoraConfig("experts", r=2), "own")
    randomize((p for p in model.parameters() if p.requires_grad), 7)
    pool = pool_of(model, on_experts())
    own = model(some_ids(shape=(2, 4))).logits
    with lora_ext.use_adapters(model, ["own", "a"]):
        y = model(some_ids(shape=(2, 4))).logits
    assert_close(y[0], own[0])
    assert_close(y[1], mixed(model, ["a", "a"])[1])
    for copied in (copy.deepcopy, by_pickle):
        other = AdapterPool.of(copied(model))
        assert (other.names, other.capacity, other.max_rank) == (pool.names, 4, 4)
        assert other.layers.keys() == pool.layers.keys()
        assert torch.equal(mixed(other.model), mixed(model))
        other.replace_adapter("a", LoraConfig("experts", r=1))
    parameters, wanted = pool.parameters("a"), mixed(model).detach()
    model.float()
    assert all(p.dtype is F32 and p.is_contiguous() for p in parameters)
    torch.testing.assert_close(mixed(model), wanted.float(), rtol=1e-3, atol=1e-3)
