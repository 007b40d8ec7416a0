"""AdapterPool: what is in it, what changes it, and that nothing but the whole of it is seen."""

import copy
import io
import itertools
import pickle

import peft
import pytest
import torch
from adapter_helpers import LINEAR, from_peft, make_ids, make_zoo, save_peft
from adapter_helpers import peft_model as zoo_of_peft
from helpers import BF16, F16, F32, F64
from torch import nn

import lora_ext
from lora_ext import AdapterPool, LoRAConfig
from lora_ext.adapters import AdapterError
from lora_ext.nn import layer_pool

NAMES = ["a", "b", None]
LAYERS = ["layers.0.q_proj", "layers.0.mlp", "layers.1.q_proj", "layers.1.mlp"]
LAYERS += ["layers.2.q_proj", "layers.2.mlp", "c_attn"]


def make_pool(capacity=4, max_rank=6, dtype=F32, **words):
    """A pool with "a" of rank 4 in all its layers, and "b" of rank 2 in some."""
    pool = AdapterPool(make_zoo(dtype), capacity, max_rank, LINEAR, **words)
    pool.add("a", LoRAConfig(LINEAR, r=4, alpha=6, dropout=0.3))
    pool.add("b", LoRAConfig(["q_proj"], r=2, alpha=-3, use_rslora=True))
    for seed, name in enumerate(pool):
        randomize(pool.parameters(name), seed)
    return pool


@torch.no_grad()
def randomize(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64))


def mixed(pool, names=NAMES):
    with lora_ext.use_adapters(pool.model, names):
        return pool.model(make_ids())


def reference(pool, names=NAMES):
    """The same by a model with the pool's adapters as its own, one after the other."""
    rows = []
    for row, name in enumerate(names):
        model = make_zoo(next(pool.model.parameters()).dtype)
        if name is not None:
            specs, tensors = pool.specs(name), pool.tensors(name)
            for path, spec in specs.items():
                config = LoRAConfig([f"re:{path}"], spec.r, spec.alpha, use_rslora=spec.use_rslora)
                lora_ext.apply_lora(model, config, path.replace(".", "_"))
                layer = model.get_submodule(path)
                layer.set_adapter(path.replace(".", "_"))
                with torch.no_grad():
                    layer.lora_a[path.replace(".", "_")].copy_(tensors[f"{path}.lora_a"])
                    layer.lora_b[path.replace(".", "_")].copy_(tensors[f"{path}.lora_b"])
        rows.append(model(make_ids())[row])
    return torch.stack(rows).detach()


def assert_close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def assert_served(pool, names=NAMES):
    """Both ways of a forward, from the parameters and from the whole pool, are the reference; in
    float64 they are one."""
    pool.model.eval()
    wanted = reference(pool, names)
    assert_close(mixed(pool, names).detach(), wanted)
    with torch.no_grad():
        assert_close(mixed(pool, names), wanted)


def values(pool, name):
    return {key: tensor.detach().clone() for key, tensor in pool.tensors(name).items()}


def slots(pool):
    """All that layers hold, as it is."""
    return {
        f"{path}.{key}": tensor.clone()
        for path, layer in pool.layers.items()
        for key, tensor in layer.pool.named_buffers()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


# ---- what it computes ----


@pytest.mark.parametrize("dtype", [F64, F32])
def test_rows_have_their_slots(dtype):
    pool = make_pool(dtype=dtype)
    assert_served(pool)
    assert_served(pool, ["b", None, "b"])
    assert (mixed(pool) - mixed(pool, ["b", "a", "a"])).abs().max() > 1e-3


def test_serving_reads_the_pool_itself():
    """In one call a layer, with the tensors that keep their addresses, whatever is added."""
    pool = make_pool(dtype=F32)
    pool.model.eval()
    pointers = {key: tensor.data_ptr() for key, tensor in pool_tensors(pool).items()}
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        mixed(pool)
    calls = [event.name for event in profile.events()]
    assert calls.count("lora_ext::lora_linear_grouped") == len(LAYERS)
    assert "aten::cat" not in calls and "aten::stack" not in calls
    pool.add("c", LoRAConfig(LINEAR, r=6))
    pool.replace("a", LoRAConfig(LINEAR, r=1))
    pool.remove("b")
    assert pointers == {key: tensor.data_ptr() for key, tensor in pool_tensors(pool).items()}
    with torch.no_grad():
        assert_close(mixed(pool, ["c", "a", None]), reference(pool, ["c", "a", None]))


def pool_tensors(pool):
    return {
        f"{path}.{key}": tensor
        for path, layer in pool.layers.items()
        for key, tensor in layer.pool.named_buffers()
    }


def test_outside_of_a_block_nothing_is_added():
    pool = make_pool()
    assert torch.equal(pool.model(make_ids()), make_zoo(F32)(make_ids()))
    reasons = {layer.reason for layer in lora_ext.explain(pool.model)}
    assert reasons == {"a pool of 4 adapters, 2 of them used, in blocks of use_adapters"}


def test_beside_adapters_of_the_model():
    model = lora_ext.apply_lora(make_zoo(), LoRAConfig(LINEAR, r=3), "own")
    randomize((p for p in model.parameters() if p.requires_grad), 5)
    pool = AdapterPool(model, 2, 4, LINEAR)
    pool.add("a", LoRAConfig(LINEAR, r=4))
    randomize(pool.parameters("a"), 6)
    own = model(make_ids())
    with lora_ext.use_adapters(model, ["a", "own", None]):
        y = model(make_ids())
    assert_close(y[1], own[1])
    assert_close(y[0], mixed(pool, ["a"] * 3)[0])
    with pytest.raises(AdapterError, match="new name"):
        pool.add("own", LoRAConfig(LINEAR))
    with pytest.raises(ValueError, match="exists already"):
        lora_ext.apply_lora(model, LoRAConfig(LINEAR), "a")


# ---- training ----


def test_an_optimizer_of_one_adapter_writes_the_pool_itself():
    pool = make_pool()
    others = values(pool, "b")
    optimizer = torch.optim.Adam(pool.parameters("a"), lr=0.01)
    before = values(pool, "a")
    for _ in range(2):
        mixed(pool).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[key], t) for key, t in pool.tensors("a").items())
    assert_same(values(pool, "b"), others)
    assert_served(pool)
    for path, layer in pool.layers.items():
        assert torch.equal(
            layer.pool.lora_a[pool.slot("a"), :4], pool.tensors("a")[f"{path}.lora_a"]
        )


def test_each_adapter_trains_as_it_does_alone():
    """Losses add up, so that each adapter has its own, its own rate and its own clipping."""
    together, *others = (make_pool(dtype=F64) for _ in range(3))
    alone = dict(zip("ab", others, strict=True))
    rates = {"a": 0.02, "b": 0.005}

    def optimizers(pool):
        return {n: torch.optim.SGD(pool.parameters(n), lr=rate) for n, rate in rates.items()}

    def clip(pool, name):
        nn.utils.clip_grad_norm_(pool.parameters(name), 0.5 if name == "a" else 2.0)

    steps = optimizers(together)
    for _ in range(3):
        y = mixed(together).square().mean((1, 2))
        (y[0] + y[1]).backward()
        for name, optimizer in steps.items():
            clip(together, name)
            optimizer.step()
            optimizer.zero_grad()
    for name, pool in alone.items():
        optimizer = optimizers(pool)[name]
        names = [n if n == name else None for n in NAMES]
        for _ in range(3):
            mixed(pool, names).square().mean((1, 2))[NAMES.index(name)].backward()
            clip(pool, name)
            optimizer.step()
            optimizer.zero_grad()
        for key, value in values(pool, name).items():
            assert_close(together.tensors(name)[key].detach(), value, 1e-9)


def test_adding_and_removing_does_not_touch_the_others():
    pool = make_pool()
    before, parameters = values(pool, "a"), pool.parameters("a")
    y = mixed(pool).detach()
    pool.add("c", LoRAConfig(LINEAR, r=6))
    randomize(pool.parameters("c"), 9)
    assert torch.equal(mixed(pool).detach(), y)
    pool.remove("c")
    pool.remove("b")
    pool.add("b2", LoRAConfig(LINEAR, r=1))
    assert_same(values(pool, "a"), before)
    assert all(one is other for one, other in zip(pool.parameters("a"), parameters, strict=True))


def test_parameters_are_not_the_models():
    pool = make_pool()
    assert not any(p.requires_grad for p in pool.model.parameters())
    assert all(p.is_leaf and p.requires_grad for p in pool.parameters("a"))
    own = {id(p) for p in pool.model.parameters()}
    assert not own & {id(p) for p in pool.parameters("a")}
    assert not any("pool" in key for key in pool.model.state_dict())
    pool.model.load_state_dict(make_zoo().state_dict())


def test_a_step_between_forward_and_backward_is_an_error():
    pool = make_pool()
    for change in (
        lambda: pool.replace("a", values(pool, "a"), LoRAConfig(LINEAR, alpha=6)),
        lambda: torch.optim.SGD(pool.parameters("a"), lr=0.1).step(),
    ):
        mixed(pool).sum().backward()
        y = mixed(pool)
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_jobs_of_one_pool_are_pipelined():
    """Another adapter's step, and another that comes, changes and goes, may fall between a forward
    and its backward."""
    together, alone = make_pool(), make_pool()

    def forward(pool, name):
        return mixed(pool, [name] * 3).square().mean()

    def step(pool, name, loss):
        loss.backward()
        optimizer = torch.optim.SGD(pool.parameters(name), lr=0.1)
        optimizer.step()
        optimizer.zero_grad()

    losses = {name: forward(together, name) for name in "ab"}
    for name in "abab":
        together.add("c", LoRAConfig(LINEAR, r=5))
        together.replace("c", LoRAConfig(LINEAR, r=3))
        step(together, name, losses[name])
        losses[name] = forward(together, name)
        together.remove("c")
    for name in "ab":
        for _ in range(2):
            step(alone, name, forward(alone, name))
        assert_same(values(together, name), values(alone, name))
    assert_served(together)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_step_ranks_below_the_pools(name):
    """Their loops on the CPU take a parameter as one run of memory."""
    pool = make_pool(dtype=F32)
    plain = {key: nn.Parameter(v.contiguous()) for key, v in values(pool, "b").items()}
    wanted = slots(pool)
    optimizers = [
        getattr(torch.optim, name)(parameters, lr=0.1, fused=fused)
        for parameters, fused in ((pool.parameters("b"), True), (plain.values(), False))
    ]
    for _ in range(3):
        mixed(pool).square().mean().backward()
        for key, parameter in pool.tensors("b").items():
            plain[key].grad = parameter.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for key, parameter in plain.items():
        assert_close(pool.tensors("b")[key], parameter, 1e-5)
        slot = wanted[key][pool.slot("b")]  # the rest of it, and other slots, stay
        slot[tuple(map(slice, parameter.shape))] = pool.tensors("b")[key]
    assert_same(slots(pool), wanted)


@pytest.mark.parametrize("dtype", [F64, F32])  # from lists, from the pool itself
def test_an_adapter_that_is_removed_within_its_block(dtype):
    """Not the base in its place, nor who is added to its slot."""
    pool = make_pool(capacity=2, dtype=dtype)
    pool.model.eval()
    with torch.no_grad(), lora_ext.use_adapters(pool.model, NAMES):
        pool.replace("b", values(pool, "b"), LoRAConfig(["q_proj"], alpha=2))
        pool.model(make_ids())
        pool.remove("a")
        for name in ("c", None, "a"):  # in the slot, then by the name
            with pytest.raises(RuntimeError, match="'a' was removed since"):
                pool.model(make_ids())
            pool.remove("c") if name is None else pool.add(name, LoRAConfig(LINEAR, r=3))
    assert_served(pool)


def test_removing_between_forward_and_backward_is_an_error():
    pool = make_pool()
    y = mixed(pool)
    pool.remove("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_is_the_adapters():
    pool = make_pool()
    pool.model.train()
    torch.manual_seed(1)
    first, second = mixed(pool).detach(), mixed(pool).detach()
    assert not torch.equal(first[0], second[0])  # "a" has dropout, "b" has none
    assert torch.equal(first[1:], second[1:])
    with torch.no_grad():
        assert not torch.equal(mixed(pool)[0], mixed(pool)[0])


# ---- compiled ----


@pytest.mark.usefixtures("forget_graphs")
def test_serving_never_recompiles(counter):
    pool = make_pool(capacity=3, dtype=F32)
    model = pool.model.eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    orders = itertools.permutations(["a", "b", None])
    for step, names in enumerate(orders):
        if step == 2:
            pool.add("c", LoRAConfig(LINEAR, r=5))
            randomize(pool.parameters("c"), 4)
            names = ("c", "a", None)
        if step == 3:
            pool.remove("b")
            names = ("a", "c", "c")
        if step > 3:
            names = tuple("c" if name == "b" else name for name in names)
        with torch.no_grad(), lora_ext.use_adapters(model, names):
            found = compiled(make_ids())
        assert_close(found, reference(pool, names), 1e-4)
        assert counter.frame_count == 1


# ---- add, replace, remove ----


def test_names_and_slots():
    pool = make_pool(capacity=2)
    assert (len(pool), list(pool), pool.names) == (2, ["a", "b"], ["a", "b"])
    assert "a" in pool and "z" not in pool and None not in pool
    assert (pool.slot("a"), pool.slot("b")) == (0, 1)
    assert "2 of 2 slots used" in repr(pool)
    assert set(pool.specs("b")) == {path for path in LAYERS if path.endswith("q_proj")}
    pool.remove("a")
    pool.add("c", LoRAConfig(LINEAR, r=2))
    assert (pool.slot("c"), pool.slot("b"), pool.names) == (0, 1, ["b", "c"])


def test_errors_leave_the_pool_as_it_was(tmp_path):
    pool = make_pool(capacity=3)
    before = slots(pool)
    good = values(pool, "a")
    config = LoRAConfig(LINEAR, alpha=6)
    key = "layers.1.mlp.lora_b"
    cases = [
        (AdapterError, "new name", ("a", LoRAConfig(LINEAR))),
        (AdapterError, "without dots", ("x.y", LoRAConfig(LINEAR))),
        (AdapterError, "at most 6, the pool's max_rank, but got 7", ("x", LoRAConfig(LINEAR, r=7))),
        (AdapterError, "init 'kaiming' or", ("x", LoRAConfig(LINEAR, r=2, init="pissa"))),
        (AdapterError, "no lora_bias", ("x", LoRAConfig(LINEAR, r=2, lora_bias=True))),
        (AdapterError, "pool's layers.*'emb'", ("x", LoRAConfig(["emb"], r=2))),
        (AdapterError, "a config beside tensors", ("x", good)),
        (AdapterError, "finite", ("x", good | {key: good[key] * float("nan")}, config)),
        (AdapterError, r"lora_b of shape \[16, 4\]", ("x", good | {key: good[key][1:]}, config)),
        (AdapterError, "two matrices", ("x", good | {key: good[key][0]}, config)),
        (AdapterError, "pairs of keys", ("x", {k: v for k, v in good.items() if k != key}, config)),
        (
            AdapterError,
            "pool's layers",
            ("x", {f"q.{e}": good[key] for e in ("lora_a", "lora_b")}, config),
        ),
        (AdapterError, "a folder with", ("x", tmp_path / "none")),
        (TypeError, "LoRAConfig, a mapping", ("x", 3)),
        (TypeError, "peft's LoraConfig: .*accelerate", ("x", peft.LoraConfig())),
        (TypeError, "no config beside a folder", ("x", tmp_path, config)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            pool.add(*arguments)
        assert_same(slots(pool), before)
        assert pool.names == ["a", "b"]
    pool.add("c", LoRAConfig(LINEAR, r=1))
    with pytest.raises(AdapterError, match="all 3 are used"):
        pool.add("d", LoRAConfig(LINEAR, r=1))
    for method in (pool.remove, pool.parameters, pool.slot, pool.specs, pool.tensors):
        with pytest.raises(AdapterError, match=r"one of the adapters \['a', 'b', 'c'\].*'z'"):
            method("z")
    with pytest.raises(AdapterError, match="'z'"):
        pool.replace("z", LoRAConfig(LINEAR))
    with pytest.raises(AdapterError, match="'z'"):
        pool.save("z", tmp_path / "z")


def test_errors_of_the_constructor():
    with pytest.raises(ValueError, match="capacity of 1 or more"):
        AdapterPool(make_zoo(), 0, 4, LINEAR)
    with pytest.raises(ValueError, match="rank r of 1 to 512"):
        AdapterPool(make_zoo(), 2, 513, LINEAR)
    with pytest.raises(ValueError, match="'emb', a LoRAEmbedding"):
        AdapterPool(make_zoo(), 2, 4, ["emb"])
    with pytest.raises(ValueError, match=r"AdapterPool\.of"):
        AdapterPool(make_pool().model, 2, 4, LINEAR)
    with pytest.raises(ValueError, match="has none"):
        AdapterPool.of(make_zoo())
    with pytest.raises(ValueError, match="PEFT's"):
        AdapterPool(zoo_of_peft(make_zoo(), target_modules=LINEAR), 2, 4, LINEAR)


def test_replacing_keeps_the_parameters_where_the_rank_stays():
    pool = make_pool()
    parameters = pool.parameters("a")
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    tensors = {key: -value for key, value in values(pool, "a").items()}
    found = pool.replace("a", tensors, LoRAConfig(LINEAR, alpha=10))
    assert all(one is other for one, other in zip(found, parameters, strict=True))
    assert_same(values(pool, "a"), tensors)
    assert pool.specs("a")["c_attn"].scaling == 2.5
    assert_served(pool)
    mixed(pool).sum().backward()
    optimizer.step()
    assert not torch.equal(pool.tensors("a")["c_attn.lora_b"], tensors["c_attn.lora_b"])


def test_what_an_optimizer_holds_of_a_former_adapter_reaches_no_slot():
    pool = make_pool()
    old = pool.parameters("a")
    optimizer = torch.optim.SGD(old, lr=1.0)
    mixed(pool).sum().backward()
    pool.replace("a", LoRAConfig(LINEAR, r=2, alpha=6, init="gaussian"))
    randomize(pool.parameters("a"))
    new = values(pool, "a")
    optimizer.step()
    assert all(parameter.numel() == 0 for parameter in old)
    assert_same(values(pool, "a"), new)
    assert_served(pool)  # with alpha / r of the new rank
    old = pool.parameters("b")
    pool.remove("b")
    assert all(parameter.numel() == 0 for parameter in old)


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("at", range(len(LAYERS)))
def test_an_interrupt_leaves_the_old_adapter_whole(monkeypatch, at, rank):
    pool = make_pool()
    before, parameters, specs = values(pool, "a"), pool.parameters("a"), pool.specs("a")
    write, calls = layer_pool.LayerPool.write, itertools.count()

    def interrupted(self, *arguments):
        write(self, *arguments)
        if next(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(layer_pool.LayerPool, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.replace("a", LoRAConfig(["q_proj", "mlp", "c_attn"], r=rank, init="gaussian"))
    calls = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        pool.add("c", LoRAConfig(LINEAR, r=rank))
    monkeypatch.undo()
    assert pool.names == ["a", "b"] and pool.specs("a") == specs
    assert_same(values(pool, "a"), before)
    assert all(one is other for one, other in zip(pool.parameters("a"), parameters, strict=True))
    assert_served(pool)
    pool.add("c", LoRAConfig(LINEAR, r=3, init="gaussian"))
    assert_served(pool, ["a", "c", "b"])


def test_many_lives_of_a_slot_leave_nothing():
    pool = make_pool(capacity=3)
    tensors = values(pool, "a")
    count = len(list(pool_tensors(pool)))
    for life in range(300):
        pool.add("c", tensors, LoRAConfig(LINEAR, alpha=life + 1))
        pool.remove("c")
    assert len(list(pool_tensors(pool))) == count
    layer = pool.layers["c_attn"].pool
    assert layer.specs.keys() == layer.slots.keys() == {"a"}
    assert_served(pool)


# ---- folders ----


def test_folders_of_peft(tmp_path):
    base = make_zoo()
    theirs = zoo_of_peft(
        base, target_modules=LINEAR, r=4, lora_alpha=6, rank_pattern={"mlp": 2}, use_rslora=True
    )
    save_peft(theirs, tmp_path / "theirs")
    pool = AdapterPool(make_zoo(), 3, 6, LINEAR)
    pool.add("a", tmp_path / "theirs")
    assert not any(p.requires_grad for p in pool.parameters("a"))
    wanted = theirs(make_ids()).detach()
    assert_close(mixed(pool, ["a"] * 3).detach(), wanted)
    pool.save("a", tmp_path / "ours")
    assert_close(from_peft(base, tmp_path / "ours")(make_ids()).detach(), wanted)
    model = lora_ext.load_adapter(make_zoo(), tmp_path / "ours")
    assert_close(model(make_ids()).detach(), wanted)
    pool.replace("a", str(tmp_path / "ours"))
    assert_close(mixed(pool, ["a"] * 3).detach(), wanted)


def test_folders_that_are_more_than_plain_lora(tmp_path):
    pool = make_pool()
    before = slots(pool)
    for words, message in (
        ({"target_modules": [*LINEAR, "conv"]}, "pool's layers.*'conv'"),
        ({"target_modules": LINEAR, "modules_to_save": ["head"]}, "biases or modules to save"),
        ({"target_modules": LINEAR, "bias": "all"}, "biases or modules to save"),
        ({"target_modules": LINEAR, "lora_bias": True}, "no lora_bias"),
        ({"target_modules": LINEAR, "use_dora": True}, "DoRA"),
        ({"target_modules": LINEAR, "r": 12}, "max_rank, but got 12"),
    ):
        folder = tmp_path / message[:6]
        save_peft(zoo_of_peft(make_zoo(), **{"r": 4, **words}), folder)
        with pytest.raises(AdapterError, match=message):
            pool.add("x", folder)
        assert_same(slots(pool), before)


# ---- the model goes elsewhere ----


def test_copies_hold_their_own_pool():
    pool = make_pool()
    wanted = mixed(pool).detach()
    stream = io.BytesIO()
    torch.save(pool.model, stream)
    stream.seek(0)
    for model in (
        copy.deepcopy(pool.model),
        pickle.loads(pickle.dumps(pool.model)),
        torch.load(stream, weights_only=False),
    ):
        other = AdapterPool.of(model)
        assert (other.names, other.capacity, other.max_rank) == (["a", "b"], 4, 6)
        assert torch.equal(mixed(other).detach(), wanted)
        assert [p.requires_grad for p in other.parameters("a")] == [True] * 14
        torch.optim.SGD(other.parameters("a"), lr=1.0)
        randomize(other.parameters("a"), 8)
        other.remove("b")
        other.add("c", LoRAConfig(LINEAR, r=2))
        assert_served(other, ["a", "c", None])
    assert torch.equal(mixed(pool).detach(), wanted) and pool.names == ["a", "b"]


def test_moves_and_casts_keep_parameters_and_memory_together():
    pool = make_pool(dtype=F64)
    parameters = pool.parameters("a")
    mixed(pool).sum().backward()
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    wanted = mixed(pool).detach()
    pool.model.float()
    assert all(p.dtype is F32 and p.grad.dtype is F32 for p in parameters)
    assert_close(mixed(pool).detach(), wanted.float(), 1e-4)
    before = values(pool, "a")
    optimizer.step()
    layer = pool.layers["c_attn"].pool
    assert torch.equal(layer.lora_b[pool.slot("a"), :, :4], parameters[-1])
    assert not torch.equal(before["c_attn.lora_b"], parameters[-1])
    pool.model.to(BF16)
    assert layer.scaling.dtype is F32 and layer.ranks.dtype is torch.int32
    assert layer.scaling[0] == 1.5
    with torch.no_grad():
        y = mixed(pool)
        assert y.dtype is BF16
        torch.testing.assert_close(y.float(), mixed(pool).float())
    pool.model.to("meta")
    assert pool.parameters("a")[0].is_meta and layer.lora_a.is_meta


def test_half_bases_have_float32_adapters():
    pool = AdapterPool(make_zoo(BF16), 2, 4, LINEAR)
    pool.add("a", LoRAConfig(LINEAR, r=4, init="gaussian"))
    assert {p.dtype for p in pool.parameters("a")} == {F32}
    assert mixed(pool, ["a", None, "a"]).dtype is BF16
    narrow = AdapterPool(make_zoo(F16), 2, 4, LINEAR, dtype=F16)
    with pytest.raises(AdapterError, match="finite values in lora_a"):
        large = {key: torch.full_like(value, 1e5) for key, value in values(pool, "a").items()}
        narrow.add("a", large, LoRAConfig(LINEAR))
    half = AdapterPool(make_zoo(BF16), 2, 4, LINEAR, dtype=BF16)
    half.add("a", values(pool, "a"), LoRAConfig(LINEAR))
    assert {p.dtype for p in half.parameters("a")} == {BF16}
    with torch.no_grad():
        y = mixed(half, ["a", None, "a"])
        torch.testing.assert_close(y, mixed(pool, ["a", None, "a"]), rtol=0.05, atol=0.05)
