"""Adapters of a pool in training: each as it is alone, whatever becomes of the others."""

import pytest
import torch
from adapter_helpers import LINEAR, make_ids, make_zoo
from helpers import F32, F64
from pool_helpers import (
    NAMES,
    TARGETS,
    assert_close,
    assert_same,
    assert_served,
    each_kind,
    make_pool,
    mixed,
    slots,
    values,
)
from torch import nn

import lora_ext
from lora_ext import LoraConfig


def test_each_adapter_trains_as_it_does_alone():
    """Losses add up, so that each adapter has its own, its own rate and its own clipping."""
    rates, limits = {"a": 0.02, "b": 0.005}, {"a": 0.5, "b": 2.0}

    def trained(*each):
        pool = make_pool(dtype=F64)
        names = [name if name in each else None for name in NAMES]
        optimizers = {n: torch.optim.SGD(pool.parameters(n), lr=rates[n]) for n in each}
        for _ in range(3):
            y = mixed(pool, names).square().mean((1, 2))
            sum(y[NAMES.index(name)] for name in each).backward()
            for name, optimizer in optimizers.items():
                nn.utils.clip_grad_norm_(pool.parameters(name), limits[name])
                optimizer.step()
                optimizer.zero_grad()
        return {name: values(pool, name) for name in each}

    together = trained("a", "b")
    for name in together:
        assert_close(trained(name)[name], together[name], 1e-9)


def test_parameters_are_not_the_models():
    pool = make_pool()
    assert not any(p.requires_grad for p in pool.model.parameters())
    assert all(p.is_leaf and p.requires_grad for p in pool.parameters("a"))
    own = {id(p) for p in pool.model.parameters()}
    assert not own & {id(p) for p in pool.parameters("a")}
    assert not any("pool" in key for key in pool.model.state_dict())
    pool.model.load_state_dict(make_zoo().state_dict())


@each_kind
def test_a_change_between_forward_and_backward_is_an_error(of):
    pool = make_pool(of=of)
    for change in (
        lambda: pool.replace_adapter("a", values(pool, "a"), LoraConfig(TARGETS[of], lora_alpha=6)),
        lambda: torch.optim.SGD(pool.parameters("a"), lr=0.1).step(),
        lambda: pool.delete_adapter("a"),
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
        together.add_adapter("c", LoraConfig(LINEAR, r=5))
        together.replace_adapter("c", LoraConfig(LINEAR, r=3))
        step(together, name, losses[name])
        losses[name] = forward(together, name)
        together.delete_adapter("c")
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


@each_kind
@pytest.mark.parametrize("dtype", [F64, F32])  # from lists, from the pool itself
def test_an_adapter_that_is_removed_within_its_block(dtype, of):
    """Not the base in its place, nor who is added to its slot."""
    pool = make_pool(capacity=2, dtype=dtype, of=of)
    some = {"linear": "q_proj", "experts": "experts.down_proj"}[of]
    pool.model.eval()
    with torch.no_grad(), lora_ext.use_adapters(pool.model, NAMES):
        pool.replace_adapter("b", values(pool, "b"), LoraConfig([some], lora_alpha=2))
        pool.model(make_ids())
        pool.delete_adapter("a")
        for name in ("c", None, "a"):  # in the slot, then by the name
            with pytest.raises(RuntimeError, match="'a' was removed since"):
                pool.model(make_ids())
            pool.delete_adapter("c") if name is None else pool.add_adapter(
                name, LoraConfig(TARGETS[of], r=3)
            )
    assert_served(pool)


def test_dropout_is_the_adapters():
    pool = make_pool()
    pool.model.train()
    torch.manual_seed(1)
    first, second = mixed(pool).detach(), mixed(pool).detach()
    assert not torch.equal(first[0], second[0])  # "a" has dropout, "b" has none
    assert torch.equal(first[1:], second[1:])
    with torch.no_grad():
        assert not torch.equal(mixed(pool)[0], mixed(pool)[0])
