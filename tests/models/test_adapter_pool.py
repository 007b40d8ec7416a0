"""AdapterPool: adapters of a model in memory that is allocated once."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import AdapterPool, LoRAConfig

CONFIG = LoRAConfig("all-linear", r=6, alpha=12)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 20, dtype=dtype)
        self.down = nn.Linear(20, 12, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)

    def forward(self, x):
        return self.norm(self.down(torch.tanh(self.up(x))))


def make_pool(names=("one", "two"), capacity=3, dtype=torch.float32):
    """A pool of adapters of ranks 6 and 3, with numbers in them; and its model."""
    model = Net(dtype).eval()
    pool = AdapterPool(model, CONFIG, capacity)
    for place, name in enumerate(names):
        pool.add(name, None if place % 2 == 0 else LoRAConfig("all-linear", r=3, alpha=2))
        fill(pool, name, place)
    return pool, model


def fill(pool, name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pool.parameters(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def x_of(model, batch=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 5, 12, generator=generator).to(model.up.weight.dtype)


def run(model, names, x=None):
    with torch.no_grad(), lora_ext.use_adapters(model, names):
        return model(x_of(model, len(names)) if x is None else x)


def alone(model, name, x):
    """By the layers' own path for one active adapter."""
    lora_ext.models.set_adapter(model, [] if name is None else name)
    with torch.no_grad():
        y = model(x)
    lora_ext.models.set_adapter(model, [])
    return y


def is_pooled(model, names):
    calls = [layer.slots.call(layer, names) for _, layer in lora_ext.models.lora_layers(model)]
    return [call is not None for call in calls] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_sample_has_its_own(dtype):
    _, model = make_pool(dtype=dtype)
    names = ["two", None, "one", "two"]
    assert is_pooled(model, ("two", "one"))
    x = x_of(model)
    y = run(model, names)
    for i, name in enumerate(names):
        wanted = alone(model, name, x[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], wanted)
    assert not torch.allclose(y[2], alone(model, None, x[2:3])[0], atol=1e-2)


def test_with_gradients_the_bits_are_those_without():
    _pool, model = make_pool()
    names = ["two", None, "one", "two"]
    with lora_ext.use_adapters(model, names):
        y = model(x_of(model))
    assert y.requires_grad
    assert torch.equal(y, run(model, names))


def test_an_optimizer_of_one_adapter_writes_the_pool_and_no_other():
    pool, model = make_pool()
    first, second = (
        torch.optim.AdamW(pool.parameters(name), lr=lr)
        for name, lr in (("one", 0.1), ("two", 0.01))
    )
    before = run(model, ["one", "two", None])
    memory = {layer.slots.lora_a.data_ptr() for _, layer in lora_ext.models.lora_layers(model)}
    model.train()
    with lora_ext.use_adapters(model, ["one", "one", None]):
        model(x_of(model, 3)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pool.parameters("one"))
    assert all(parameter.grad is None for parameter in pool.parameters("two"))
    first.step()
    second.step()
    model.eval()
    after = run(model, ["one", "two", None])
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1:], before[1:])
    assert is_pooled(model, ("one", "two"))
    assert memory == {
        layer.slots.lora_a.data_ptr() for _, layer in lora_ext.models.lora_layers(model)
    }


def test_the_model_is_frozen_and_no_adapter_is_active():
    pool, model = make_pool()
    pool.add("three", trainable=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert not any("three" in name for name in trained)
    assert torch.equal(model(x_of(model)), alone(model, None, x_of(model)))


def test_what_comes_and_goes():
    pool, model = make_pool(capacity=2)
    assert (len(pool), list(pool), "one" in pool, "three" in pool) == (
        2,
        ["one", "two"],
        True,
        False,
    )
    with pytest.raises(ValueError, match="expected room for 'three', but all 2 slots are taken"):
        pool.add("three")
    kept = run(model, ["two"])
    pool.remove("one")
    with pytest.raises(ValueError, match=r"names out of \['two'\]"):
        run(model, ["one"])
    pool.add("three")
    fill(pool, "three", 9)
    assert list(pool) == ["two", "three"]
    assert torch.equal(run(model, ["two"]), kept)
    assert is_pooled(model, ("three", "two"))
    wanted = alone(model, "three", x_of(model, 1))
    torch.testing.assert_close(run(model, ["three"]), wanted)


def test_a_free_slot_reaches_nobody():
    """Megatron-Bridge#5768: an idle slot can make backward unsafe."""
    pool, model = make_pool()
    before = run(model, ["one", None])
    for _, layer in lora_ext.models.lora_layers(model):
        layer.slots.lora_a[2].fill_(torch.nan)
        layer.slots.lora_b[2].fill_(torch.nan)
        slot = layer.slots.names["two"]  # of rank 3 in room for 6
        layer.slots.lora_a[slot, 3:].fill_(torch.nan)
        layer.slots.lora_b[slot, :, 3:].fill_(torch.nan)
    assert torch.equal(run(model, ["one", None]), before)
    assert run(model, ["two"]).isfinite().all()
    pool.remove("two")
    pool.add("three")
    assert run(model, ["three"]).isfinite().all()


def test_deleted_past_the_pool():
    pool, model = make_pool(capacity=2)
    lora_ext.models.delete_adapter(model, "one")
    assert list(pool) == ["two"]
    pool.add("three")
    assert list(pool) == ["two", "three"]
    with pytest.raises(KeyError, match="'one'"):
        pool.remove("one")


def test_a_write_past_torch_is_seen():
    """Of PEFT's hot-swap, which writes `.data`: no packed copy can be stale."""
    pool, model = make_pool()
    before = run(model, ["one"])
    for parameter in pool.parameters("one"):
        parameter.data.mul_(2)
    changed = run(model, ["one"])
    assert not torch.allclose(before, changed, atol=1e-3)
    for parameter in pool.parameters("one"):  # other memory: no view of the pool any more
        parameter.data = parameter.data / 2
    assert not is_pooled(model, ("one",))
    assert torch.equal(run(model, ["one"]), before)


# ---- replace ----


def factors_of(pool, model, name):
    return {
        path: (layer.lora_a[name].detach().clone(), layer.lora_b[name].detach().clone())
        for path, layer in lora_ext.models.lora_layers(model)
    }


def test_replace_writes_the_same_parameters():
    pool, model = make_pool()
    own = pool.parameters("one")
    values = {
        path: (torch.full_like(a, 0.1), torch.full_like(b, 0.2).double())
        for path, (a, b) in factors_of(pool, model, "one").items()
    }
    other = run(model, ["two"])
    pool.replace("one", values)
    assert all(a is b for a, b in zip(own, pool.parameters("one"), strict=True))
    assert [p.unique().tolist() for p in own] == [[pytest.approx(v)] for v in (0.1, 0.2, 0.1, 0.2)]
    assert torch.equal(run(model, ["two"]), other)
    assert is_pooled(model, ("one", "two"))


FAULTS = {
    "a layer less": lambda v: {"up": v["up"]},
    "a layer more": lambda v: {**v, "norm": v["up"]},
    "another rank": lambda v: {**v, "down": (v["down"][0][:2], v["down"][1][:, :2])},
    "integers": lambda v: {**v, "down": (v["down"][0].int(), v["down"][1])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_replace_refuses_before_it_writes(fault):
    pool, model = make_pool()
    values = factors_of(pool, model, "one")
    before = run(model, ["one", "two"])
    changed = {path: (a + 1, b + 1) for path, (a, b) in values.items()}
    with pytest.raises(ValueError, match=r"expected (factors for 2 layers|a floating tensor)"):
        pool.replace("one", FAULTS[fault](changed))
    assert torch.equal(run(model, ["one", "two"]), before)


def test_an_interrupt_within_replace_puts_all_back(monkeypatch):
    pool, model = make_pool()
    values = {path: (a + 1, b + 1) for path, (a, b) in factors_of(pool, model, "one").items()}
    before = run(model, ["one", "two"])

    class Interrupting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs or {})

    a, b = values["down"]
    values["down"] = (a, b.as_subclass(Interrupting))
    with pytest.raises(KeyboardInterrupt):
        pool.replace("one", values)
    assert torch.equal(run(model, ["one", "two"]), before)


# ---- folders ----


def test_save_and_load(tmp_path):
    pool, model = make_pool()
    pool.save("two", tmp_path)
    pool.load("three", tmp_path)
    assert torch.equal(run(model, ["three"]), run(model, ["two"]))
    assert is_pooled(model, ("three",))
    assert not any(parameter.requires_grad for parameter in pool.parameters("three"))
    plain = lora_ext.load_adapter(Net().eval(), tmp_path)
    torch.testing.assert_close(plain(x_of(model, 1)), run(model, ["two"]))


def test_replace_by_a_folder_takes_its_scaling(tmp_path):
    pool, model = make_pool()
    other = lora_ext.apply_lora(Net(), LoRAConfig("all-linear", r=6, alpha=3, init="gaussian"))
    for name, parameter in other.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    lora_ext.save_adapter(other, tmp_path)
    own, second = pool.parameters("one"), run(model, ["two"])
    pool.replace("one", tmp_path)
    torch.testing.assert_close(run(model, ["one"]), other.eval()(x_of(model, 1)))
    assert all(a is b for a, b in zip(own, pool.parameters("one"), strict=True))
    assert torch.equal(run(model, ["two"]), second)
    assert lora_ext.models.lora_layers(model)
    assert list(pool) == ["one", "two"]
    assert [name for name in ("one", "two", "one_as_it_comes") if name in model.up.adapters] == [
        "one",
        "two",
    ]


def test_a_folder_of_a_rank_that_does_not_fit(tmp_path):
    large = lora_ext.apply_lora(Net(), LoRAConfig("all-linear", r=7))
    lora_ext.save_adapter(large, tmp_path)
    pool, model = make_pool()
    before = run(model, ["one", "two"])
    with pytest.raises(ValueError, match="expected a rank of at most 6"):
        pool.load("three", tmp_path)
    with pytest.raises(ValueError, match="expected a rank of at most 6"):
        pool.replace("one", tmp_path)
    assert list(pool) == ["one", "two"]
    assert list(model.up.adapters) == ["one", "two"]
    assert torch.equal(run(model, ["one", "two"]), before)


# ---- what is refused ----


def test_configs_that_do_not_fit():
    pool, model = make_pool()
    keys = set(model.state_dict())
    cases = {
        "a rank of at most 6": LoRAConfig("all-linear", r=7),
        "a plain adapter": LoRAConfig("all-linear", r=2, lora_bias=True),
        "low-rank factors alone": LoRAConfig("all-linear", r=2, modules_to_save=["norm"]),
        "a plain adapter, but": LoRAConfig("all-linear", r=2, init="olora"),
        "torch.float32, but": LoRAConfig("all-linear", r=2, adapter_dtype=torch.bfloat16),
    }
    for words, config in cases.items():
        with pytest.raises(ValueError, match=words):
            pool.add("three", config)
        assert list(pool) == ["one", "two"]
        assert set(model.state_dict()) == keys
    with pytest.raises(ValueError, match="has 'one'"):
        pool.add("one")
    small = Net()
    pool = AdapterPool(small, LoRAConfig("up", r=2), 2)
    with pytest.raises(ValueError, match="is in 'down', too"):
        pool.add("one", LoRAConfig("all-linear", r=2))
    assert len(pool) == 0


@pytest.mark.parametrize("capacity", [0, -1, 1.5, True, "2"])
def test_capacities(capacity):
    model = Net()
    with pytest.raises(ValueError, match="expected a capacity of 1 or more"):
        AdapterPool(model, CONFIG, capacity)
    assert type(model.up) is nn.Linear


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="expected a model without adapters"):
        AdapterPool(lora_ext.apply_lora(Net(), CONFIG), CONFIG, 2)
    model = nn.ModuleDict({"table": nn.Embedding(4, 4)})
    with pytest.raises(ValueError, match="expected a linear layer at 'table'"):
        AdapterPool(model, LoRAConfig("table", r=2), 2)
    assert type(model["table"]) is nn.Embedding
    pool, _ = make_pool()
    for call in (pool.parameters, pool.remove, lambda name: pool.save(name, "x")):
        with pytest.raises(KeyError, match="expected one of"):
            call("nine")
    with pytest.raises(KeyError, match="expected one of"):
        pool.replace("nine", {})


# ---- what modules go through ----


def test_a_cast_moves_the_pool_too():
    pool, model = make_pool()
    before = run(model, ["one", "two"])
    own = pool.parameters("one")
    model.double()
    assert is_pooled(model, ("one", "two"))
    assert pool.parameters("one")[0].dtype == torch.float64
    assert own[0] is pool.parameters("one")[0]
    after = run(model, ["one", "two"])
    torch.testing.assert_close(after.float(), before)
    pool.add("three", LoRAConfig("all-linear", r=2, adapter_dtype=torch.float64))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_the_adapters_and_other_memory(how):
    pool, model = make_pool()
    before = run(model, ["one", "two"])
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, ["one", "two"]), before)
    for parameter in pool.parameters("one"):
        parameter.data.zero_()
    assert torch.equal(run(twin, ["one", "two"]), before)


def test_state_dicts():
    pool, model = make_pool()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any("slots" in name for name in state)
    before = run(model, ["one", "two"])
    for parameter in pool.parameters("one"):
        parameter.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(run(model, ["one", "two"]), before)
    assert is_pooled(model, ("one", "two"))


def test_nbytes():
    pool, _model = make_pool(capacity=3)
    factors = 3 * 4 * 6 * ((12 + 20) + (20 + 12))
    assert pool.nbytes == factors + 2 * 3 * (4 + 4)


def test_a_layer_that_lacks_an_adapter_has_the_base_there():
    pool, model = make_pool(names=())
    pool.add("up", LoRAConfig("up", r=2))
    pool.add("both", LoRAConfig("all-linear", r=2))
    for place, name in enumerate(pool):
        fill(pool, name, place)
    x = x_of(model)
    y = run(model, ["up", "both", None, "up"])
    for i, name in enumerate(("up", "both", None, "up")):
        torch.testing.assert_close(y[i : i + 1], alone(model, name, x[i : i + 1]))


def test_an_x_of_another_dtype_than_the_pools():
    """bfloat16 activations on a pool of bfloat16 factors, then float32 ones: no list, a list."""
    model = Net(torch.bfloat16).eval()
    config = LoRAConfig("all-linear", r=4, adapter_dtype=torch.bfloat16)
    pool = AdapterPool(model, config, 2)
    pool.add("one")
    fill(pool, "one", 3)
    half = run(model, ["one", None])
    for _, layer in lora_ext.models.lora_layers(model):
        layer.slots = None
    assert torch.equal(run(model, ["one", None]), half)
