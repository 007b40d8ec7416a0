"""AdapterPool: what is in it, what changes it, and that nothing but the whole of it is seen."""

import copy
import itertools
from functools import partial

import peft
import pytest
import torch
from adapter_helpers import LINEAR, from_peft, make_ids, make_zoo, save_peft
from adapter_helpers import peft_model as zoo_of_peft
from helpers import BF16, F16, F32, F64, by_pickle, by_torch_save
from pool_helpers import (
    LAYERS,
    TARGETS,
    assert_close,
    assert_same,
    assert_served,
    buffers,
    make_pool,
    mixed,
    randomize,
    reference,
    slots,
    values,
)

import lora_ext
from lora_ext import AdapterPool, LoraConfig
from lora_ext.adapters import AdapterError
from lora_ext.pool import layer_pool

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
    pointers = {key: tensor.data_ptr() for key, tensor in buffers(pool).items()}
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        mixed(pool)
    calls = [event.name for event in profile.events()]
    assert calls.count("lora_ext::lora_grouped") == len(LAYERS)
    assert "aten::cat" not in calls and "aten::stack" not in calls
    pool.add_adapter("c", LoraConfig(LINEAR, r=6))
    pool.replace_adapter("a", LoraConfig(LINEAR, r=1))
    pool.delete_adapter("b")
    assert pointers == {key: tensor.data_ptr() for key, tensor in buffers(pool).items()}
    with torch.no_grad():
        assert_close(mixed(pool, ["c", "a", None]), reference(pool, ["c", "a", None]))


def test_outside_of_a_block_nothing_is_added():
    pool = make_pool()
    assert torch.equal(pool.model(make_ids()), make_zoo(F32)(make_ids()))
    reasons = {layer.reason for layer in lora_ext.explain(pool.model)}
    assert reasons == {"a pool with 2 of 4 slots used, only in blocks of use_adapters"}


def test_beside_adapters_of_the_model():
    model = lora_ext.apply_lora(make_zoo(), LoraConfig(LINEAR, r=3), "own")
    randomize((p for p in model.parameters() if p.requires_grad), 5)
    pool = AdapterPool(model, 2, 4, LINEAR)
    pool.add_adapter("a", LoraConfig(LINEAR, r=4))
    randomize(pool.parameters("a"), 6)
    own = model(make_ids())
    with lora_ext.use_adapters(model, ["a", "own", None]):
        y = model(make_ids())
    assert_close(y[1], own[1])
    assert_close(y[0], mixed(pool, ["a"] * 3)[0])
    with pytest.raises(AdapterError, match="new name"):
        pool.add_adapter("own", LoraConfig(LINEAR))
    with pytest.raises(ValueError, match="exists already"):
        lora_ext.apply_lora(model, LoraConfig(LINEAR), "a")


# ---- compiled ----


@pytest.mark.usefixtures("forget_graphs")
def test_serving_never_recompiles(counter):
    pool = make_pool(capacity=3, dtype=F32)
    model = pool.model.eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    orders = itertools.permutations(["a", "b", None])
    for step, names in enumerate(orders):
        if step == 2:
            pool.add_adapter("c", LoraConfig(LINEAR, r=5))
            randomize(pool.parameters("c"), 4)
            names = ("c", "a", None)
        if step == 3:
            pool.delete_adapter("b")
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
    pool.delete_adapter("a")
    pool.add_adapter("c", LoraConfig(LINEAR, r=2))
    assert (pool.slot("c"), pool.slot("b"), pool.names) == (0, 1, ["b", "c"])


def test_errors_leave_the_pool_as_it_was(tmp_path):
    pool = make_pool(capacity=3)
    before = slots(pool)
    good = values(pool, "a")
    config = LoraConfig(LINEAR, lora_alpha=6)
    key = "layers.1.mlp.lora_b"
    cases = {
        AdapterError: [
            ("new name", ("a", LoraConfig(LINEAR))),
            ("without dots", ("x.y", LoraConfig(LINEAR))),
            ("at most 6, the pool's max_rank, but got 7", ("x", LoraConfig(LINEAR, r=7))),
            (
                "init_lora_weights True or",
                ("x", LoraConfig(LINEAR, r=2, init_lora_weights="pissa")),
            ),
            ("no lora_bias", ("x", LoraConfig(LINEAR, r=2, lora_bias=True))),
            ("pool's layers.*'emb'", ("x", LoraConfig(["emb"], r=2))),
            ("a config beside tensors", ("x", good)),
            ("use_dora=True", ("x", peft.LoraConfig(target_modules=["q_proj"], use_dora=True))),
            ("finite", ("x", good | {key: good[key] * float("nan")}, config)),
            (r"lora_b of shape \[16, 4\]", ("x", good | {key: good[key][1:]}, config)),
            ("two matrices", ("x", good | {key: good[key][0]}, config)),
            ("lora_b' for each layer", ("x", {k: v for k, v in good.items() if k != key}, config)),
            ("pool's layers", ("x", {"q.lora_a": good[key], "q.lora_b": good[key]}, config)),
            ("a folder with", ("x", tmp_path / "none")),
        ],
        TypeError: [
            ("LoraConfig, a mapping", ("x", 3)),
            ("LoraConfig, a mapping .* LoHaConfig", ("x", peft.LoHaConfig())),
            ("one LoraConfig, but got two", ("x", config, config)),
            ("no config beside a folder", ("x", tmp_path, config)),
        ],
    }
    for error, (message, arguments) in ((e, case) for e, found in cases.items() for case in found):
        with pytest.raises(error, match=message):
            pool.add_adapter(*arguments)
        assert_same(slots(pool), before)
        assert pool.names == ["a", "b"]
    pool.add_adapter("c", LoraConfig(LINEAR, r=1))
    with pytest.raises(AdapterError, match="all 3 are used"):
        pool.add_adapter("d", LoraConfig(LINEAR, r=1))
    of_a_name = (pool.delete_adapter, pool.parameters, pool.slot, pool.specs, pool.tensors)
    for call in (
        *(partial(verb, "z") for verb in of_a_name),
        lambda: pool.replace_adapter("z", LoraConfig(LINEAR)),
        lambda: pool.save_adapter("z", tmp_path / "z"),
    ):
        with pytest.raises(AdapterError, match=r"one of the adapters \['a', 'b', 'c'\].*'z'"):
            call()


def test_errors_of_the_constructor():
    peft_zoo = zoo_of_peft(make_zoo(), target_modules=LINEAR)
    for message, arguments in (
        ("capacity of 1 or more", (make_zoo(), 0, 4, LINEAR)),
        ("rank r of 1 to 512", (make_zoo(), 2, 513, LINEAR)),
        ("'emb', a LoRAEmbedding", (make_zoo(), 2, 4, ["emb"])),
        (r"AdapterPool\.of", (make_pool().model, 2, 4, LINEAR)),
        ("PEFT's", (peft_zoo, 2, 4, LINEAR)),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterPool(*arguments)
    with pytest.raises(ValueError, match="has none"):
        AdapterPool.of(make_zoo())


def test_replacing_keeps_the_parameters_where_the_rank_stays():
    pool = make_pool()
    parameters = pool.parameters("a")
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    tensors = {key: -value for key, value in values(pool, "a").items()}
    found = pool.replace_adapter("a", tensors, LoraConfig(LINEAR, lora_alpha=10))
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
    pool.replace_adapter("a", LoraConfig(LINEAR, r=2, lora_alpha=6, init_lora_weights="gaussian"))
    randomize(pool.parameters("a"))
    new = values(pool, "a")
    optimizer.step()
    assert all(parameter.numel() == 0 for parameter in old)
    assert_same(values(pool, "a"), new)
    assert_served(pool)  # with alpha / r of the new rank
    fewer = {key: value[:1] if "lora_a" in key else value[:, :1] for key, value in new.items()}
    assert all(p.requires_grad for p in pool.replace_adapter("a", fewer, LoraConfig(LINEAR)))
    old = pool.parameters("b")
    pool.delete_adapter("b")
    assert all(parameter.numel() == 0 for parameter in old)


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize(
    ("of", "at"), [("linear", at) for at in range(7)] + [("experts", at) for at in range(4)]
)
def test_an_interrupt_leaves_the_old_adapter_whole(monkeypatch, of, at, rank):
    pool, targets = make_pool(of=of), TARGETS[of]
    before, parameters, specs = values(pool, "a"), pool.parameters("a"), pool.specs("a")
    write, calls = layer_pool.LayerPool.write, itertools.count()

    def interrupted(self, *arguments):
        write(self, *arguments)
        if next(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(layer_pool.LayerPool, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.replace_adapter("a", LoraConfig(targets, r=rank, init_lora_weights="gaussian"))
    calls = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        pool.add_adapter("c", LoraConfig(targets, r=rank))
    monkeypatch.undo()
    assert pool.names == ["a", "b"] and pool.specs("a") == specs
    assert_same(values(pool, "a"), before)
    assert all(one is other for one, other in zip(pool.parameters("a"), parameters, strict=True))
    assert_served(pool)
    pool.add_adapter("c", LoraConfig(targets, r=3, init_lora_weights="gaussian"))
    assert_served(pool, ["a", "c", "b"])


def test_many_lives_of_a_slot_leave_nothing():
    pool = make_pool(capacity=3)
    tensors = values(pool, "a")
    count = len(list(buffers(pool)))
    for life in range(300):
        pool.add_adapter("c", tensors, LoraConfig(LINEAR, lora_alpha=life + 1))
        pool.delete_adapter("c")
    assert len(list(buffers(pool))) == count
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
    pool.add_adapter("a", tmp_path / "theirs")
    assert not any(p.requires_grad for p in pool.parameters("a"))
    wanted = theirs(make_ids()).detach()
    assert_close(mixed(pool, ["a"] * 3).detach(), wanted)
    pool.save_adapter("a", tmp_path / "ours")
    assert_close(from_peft(base, tmp_path / "ours")(make_ids()).detach(), wanted)
    model = lora_ext.load_adapter(make_zoo(), tmp_path / "ours")
    assert_close(model(make_ids()).detach(), wanted)
    pool.replace_adapter("a", str(tmp_path / "ours"))
    assert_close(mixed(pool, ["a"] * 3).detach(), wanted)


def test_folders_that_are_more_than_plain_lora(tmp_path):
    pool = make_pool()
    before = slots(pool)
    for words, message in (
        ({"target_modules": [*LINEAR, "conv"]}, "pool's layers.*'conv'"),
        ({"target_modules": LINEAR, "modules_to_save": ["head"]}, "biases or modules_to_save"),
        ({"target_modules": LINEAR, "bias": "all"}, "biases or modules_to_save"),
        ({"target_modules": LINEAR, "lora_bias": True}, "no lora_bias"),
        ({"target_modules": LINEAR, "use_dora": True}, "DoRA"),
        ({"target_modules": LINEAR, "r": 12}, "max_rank, but got 12"),
    ):
        folder = tmp_path / message[:6]
        save_peft(zoo_of_peft(make_zoo(), **{"r": 4, **words}), folder)
        with pytest.raises(AdapterError, match=message):
            pool.add_adapter("x", folder)
        assert_same(slots(pool), before)


# ---- the model goes elsewhere ----


def test_copies_hold_their_own_pool():
    pool = make_pool()
    wanted = mixed(pool).detach()
    for copied in (copy.deepcopy, by_pickle, by_torch_save):
        other = AdapterPool.of(copied(pool.model))
        assert (other.names, other.capacity, other.max_rank) == (["a", "b"], 4, 6)
        assert torch.equal(mixed(other).detach(), wanted)
        assert [p.requires_grad for p in other.parameters("a")] == [True] * 14
        torch.optim.SGD(other.parameters("a"), lr=1.0)
        randomize(other.parameters("a"), 8)
        other.delete_adapter("b")
        other.add_adapter("c", LoraConfig(LINEAR, r=2))
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
    pool.add_adapter("thirds", LoraConfig(LINEAR, r=3, lora_alpha=4))
    pool.model.to(BF16)
    assert layer.scaling.dtype is F32 and layer.ranks.dtype is torch.int32
    assert layer.scaling[0] == 1.5 and layer.scaling[pool.slot("thirds")] == torch.tensor(4 / 3)
    pool.delete_adapter("thirds")
    with torch.no_grad():
        y = mixed(pool)
        assert y.dtype is BF16
        torch.testing.assert_close(y.float(), mixed(pool).float())
    pool.model.to("meta")
    assert pool.parameters("a")[0].is_meta and layer.lora_a.is_meta


def test_half_bases_have_float32_adapters():
    pool = AdapterPool(make_zoo(BF16), 2, 4, LINEAR)
    pool.add_adapter("a", LoraConfig(LINEAR, r=4, init_lora_weights="gaussian"))
    assert {p.dtype for p in pool.parameters("a")} == {F32}
    assert mixed(pool, ["a", None, "a"]).dtype is BF16
    narrow = AdapterPool(make_zoo(F16), 2, 4, LINEAR, adapter_dtype=F16)
    with pytest.raises(AdapterError, match="finite values in lora_a"):
        large = {key: torch.full_like(value, 1e5) for key, value in values(pool, "a").items()}
        narrow.add_adapter("a", large, LoraConfig(LINEAR))
    half = AdapterPool(make_zoo(BF16), 2, 4, LINEAR, adapter_dtype=BF16)
    half.add_adapter("a", values(pool, "a"), LoraConfig(LINEAR))
    assert {p.dtype for p in half.parameters("a")} == {BF16}
    with torch.no_grad():
        y = mixed(half, ["a", None, "a"])
        torch.testing.assert_close(y, mixed(pool, ["a", None, "a"]), rtol=0.05, atol=0.05)
