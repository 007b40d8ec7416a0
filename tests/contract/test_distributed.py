"""Both kinds of layer in two processes on the CPU: DistributedDataParallel, FSDP2 and FSDP1
train as one process does.

What both processes compute is compared with the two halves of the batch in one, whose gradients are
averaged: the same sums, so that the bits agree.
"""

import itertools
from unittest import mock

import pytest
import torch
import two_processes
from torch import nn
from two_processes import (
    WORLD,
    CallsOfOps,
    assert_near,
    gradients_of,
    half,
    in_bfloat16,
    values_of,
)

import lora_ext
import lora_ext.nn.experts
from contract import bases
from contract.cases import KINDS

case, test_two_processes = two_processes.cases(__name__)

STEPS = 2
# Shares of the largest value. PEFT's order of operations rounds otherwise, by 2e-5 after the steps
# on some processors; a step changes values by 1e-2.
NEAR_PEFT = 1e-3


def alike(*adapters, dropout=0.0, count=2, nets=("net",)):
    """Subjects of the same values, for each kind that has such adapters."""
    for kind, net, names in itertools.product(KINDS, nets, adapters):
        if kind.has(net, names):
            yield tuple(kind.make(net, names, dropout=dropout) for _ in range(count))


def train(subject, forward, ranks, seeds=None):
    """Steps on the parts of these ranks, averaged; name -> gradient of the last one."""
    batches = subject.x(8 * STEPS).chunk(STEPS)
    return two_processes.train(subject.model, batches, ranks, forward, seeds=seeds)


def train_alone(subject, seeds=None):
    return train(subject, subject.model, range(WORLD), seeds)


def named(subject):
    return list(subject.model.named_parameters())


def values(subject):
    return values_of(subject.model)


def assert_trained_alike(subject, gradients, alone, seeds=None, tolerance=0.0):
    wanted = train_alone(alone, seeds)
    two_processes.assert_trained_alike(subject.model, gradients, alone.model, wanted, tolerance)


# ---- DistributedDataParallel ----


def parallel(subject):
    return nn.parallel.DistributedDataParallel(subject.model)


@case
def ddp_trains_as_one_process(rank):
    """The bits of one process, near the numbers of PEFT's operations."""
    for subject, alone, own in alike("one", "three", "dora", count=3):
        before = values(subject)
        theirs = subject.holding(subject.in_peft_order())
        trained = {name for name, parameter in named(subject) if parameter.requires_grad}
        gradients = train(subject, parallel(subject), [rank])
        assert_trained_alike(subject, gradients, alone)
        train_alone(theirs)
        assert_near(values(subject), values(theirs), NEAR_PEFT)
        after = values(subject)
        assert {name for name in after if not torch.equal(after[name], before[name])} == trained
        train(own, own.model, [rank])  # on its half alone
        assert all(not torch.equal(values(own)[name], after[name]) for name in trained)


@case
def ddp_after_another_adapter_was_set(rank):
    """A fresh wrap, without find_unused_parameters; the other adapters stay as they were."""
    for subject, alone in alike("three"):
        for names in (["a"], ["b"], ["a", "b"]):
            for one in (subject, alone):
                one.model.zero_grad()
                one.set_adapter(names)
            before = values(subject)
            gradients = train(subject, parallel(subject), [rank])
            assert_trained_alike(subject, gradients, alone)
            for name, value in values(subject).items():
                is_active = not set(names).isdisjoint(name.split("."))
                assert torch.equal(value, before[name]) != (is_active and "lora_" in name), name


@case
def ddp_with_an_adapter_for_each_sample(rank):
    """All ranks name all adapters, with an index: those without rows on a rank get zeros, so that
    no rank waits for a gradient that does not come."""
    index = {0: [0, 0, -1, 1], 1: [1, 1, 2, 2]}  # "c" has no rows on rank 0, "a" none on rank 1

    def through(forward, subject, ranks):
        trained = [p for p in subject.model.parameters() if p.requires_grad]
        optimizer, x = torch.optim.SGD(trained, 0.05), subject.x(8)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for one in ranks:
                rows = torch.tensor(index[one], dtype=torch.int32)
                with lora_ext.use_adapters(subject.model, ["a", "b", "c"], rows):
                    (forward(half(x, one)).square().mean() / len(ranks)).backward()
            optimizer.step()
        return gradients_of(subject.model)

    for subject, alone in alike("three"):
        before = values(subject)
        gradients = through(parallel(subject), subject, [rank])
        wanted = through(alone.model, alone, range(WORLD))
        assert all(value.abs().max() > 0 for value in wanted.values())
        assert_near(gradients, wanted)
        assert_near(values(subject), values(alone))
        assert any(not torch.equal(value, before[name]) for name, value in values(subject).items())


# ---- FSDP2 ----


def shard(subject, by_layers=False, **options):
    """By layers with adapters and the root, or by the root alone."""
    two_processes.shard(subject.model, subject.layers if by_layers else (), **options)
    assert all(hasattr(parameter, "full_tensor") for _, parameter in named(subject))


def assert_sharded_between_forwards(subject):
    """`explain` does not take PEFT's pieces for layers; ours know their sizes under FSDP2."""
    paths = {layer.path for layer in lora_ext.explain(subject.model)}
    assert (paths == {"sharded"}) == (subject.kind.name == "peft"), paths


@case
def fsdp2_trains_as_one_process(rank):
    """By the op where it computes in one process."""
    for by_layers in (False, True):
        for subject, alone in alike("one", "three", "dora"):
            theirs = subject.holding(subject.in_peft_order())
            fused = [layer.path for layer in lora_ext.explain(subject.model)].count("fused")
            shard(subject, by_layers)
            assert_sharded_between_forwards(subject)
            with CallsOfOps() as calls:
                gradients = train(subject, subject.model, [rank])
            assert calls.of["lora"] == STEPS * fused
            assert_sharded_between_forwards(subject)
            assert_trained_alike(subject, gradients, alone, tolerance=subject.kind.sharded)
            train_alone(theirs)
            assert_near(values(subject), values(theirs), NEAR_PEFT)


@case
def fsdp2_in_mixed_precision(rank):
    """Parameters and reductions in bfloat16: near float32's, every gradient there."""
    for subject, alone in alike("one"):
        shard(subject, **in_bfloat16())
        gradients, wanted = train(subject, subject.model, [rank]), train_alone(alone)
        assert list(gradients) == list(wanted)
        assert all(value.abs().max() > 0 for value in gradients.values())
        assert_near(values(subject), values(alone), 2e-2)


@case
def dropout_draws_each_process_own_mask(rank):
    seeds = [11, 12]
    for wrap in (parallel, shard):
        for subject, alone in alike("one", "three", dropout=0.4):
            gradients = train(subject, wrap(subject) or subject.model, [rank], seeds)
            assert_trained_alike(subject, gradients, alone, seeds)


@case
def fsdp2_after_another_adapter_was_set(rank):
    """No fresh wrap is needed: the sharded parameters say what is trained."""
    for subject, alone in alike("three"):
        shard(subject)
        for names in (["a"], ["b"], ["b", "a"]):
            for one in (subject, alone):
                one.model.zero_grad()
                one.set_adapter(names)
            gradients = train(subject, subject.model, [rank])
            assert_trained_alike(subject, gradients, alone)
        with torch.no_grad(), subject.disabled(), alone.disabled():
            x = subject.x(4)
            torch.testing.assert_close(subject(x), alone(x))


# ---- experts ----


def shard_experts(subject):
    """Each module of them is a unit, its gathered weights one call's."""
    modules = dict(subject.model.named_modules())
    two_processes.shard(subject.model, [modules[n] for n in modules if n.endswith("mlp.experts")])
    assert any(hasattr(p, "full_tensor") for name, p in named(subject) if "down" in name)


@case
def experts_train_as_one_process(rank):
    """In each step each layer of experts is one call of `lora_experts`."""
    for wrap in (parallel, shard_experts):
        for subject, alone in alike("one", nets=bases.MIXTURES):
            module = lora_ext.nn.experts
            with mock.patch.object(module, "lora_experts", wraps=module.lora_experts) as calls:
                gradients = train(subject, wrap(subject) or subject.model, [rank])
            assert calls.call_count == STEPS * 2
            assert len(gradients) == 2 * 3 * 2
            assert_trained_alike(subject, gradients, alone)


# ---- FSDP1 ----


@case
def fsdp1_trains_as_one_process(rank):
    """Its flat parameters ask for gradients of what is frozen beside what is trained: PEFT's layers
    call the base and add the update, ours refuse. `explain` does not take pieces for layers."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for subject, alone in alike("one", "three"):
        if subject.kind.name != "peft":
            with pytest.raises(RuntimeError, match="expected a frozen weight"):
                FullyShardedDataParallel(subject.model, **options)(subject.x(4))
            continue
        fused = [layer.path for layer in lora_ext.explain(subject.model)].count("fused")
        wrapped = FullyShardedDataParallel(subject.model, **options)
        assert {layer.path for layer in lora_ext.explain(wrapped)} == {"sharded"}
        with CallsOfOps() as calls:
            train(subject, wrapped, [rank])
        assert calls.of["lora"] == STEPS * fused
        train_alone(alone)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            assert_near(values(subject), values(alone), 1e-5)
            assert "sharded" not in {layer.path for layer in lora_ext.explain(wrapped)}
