"""Accelerated PEFT models in two processes: DDP and FSDP2 train as one process does.

What both compute is compared with the two halves of the batch in one process, whose gradients are
averaged, by PEFT's own forward and by ours.
"""

from unittest import mock

import torch
import two_processes
from helpers import F32
from peft.tuners.lora import LoraLayer
from peft_helpers import make_ids, net
from torch import nn
from two_processes import WORLD, half

import lora_ext
from lora_ext.peft import linear, quick

case, test_two_processes = two_processes.cases(__name__)

TARGETS = ["up", "gate", "down"]


def model_of(adapters, accelerate=True, **words):
    model = net(adapters, F32, **words)
    return lora_ext.accelerate(model) if accelerate else model


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train_alone(model, steps=2, seeds=None):
    """Parameters after steps on the averaged gradients of the halves."""
    optimizer = optimizer_of(model)
    for number in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            torch.manual_seed(seeds[rank] if seeds else 0)
            (model(half(make_ids(8, number), rank)).square().mean() / WORLD).backward()
        optimizer.step()
    return values_of(model)


def train_together(model, forward, rank, steps=2, seeds=None):
    optimizer = optimizer_of(model)
    for number in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(seeds[rank] if seeds else 0)
        forward(half(make_ids(8, number), rank)).square().mean().backward()
        optimizer.step()
    return values_of(model)


def values_of(model):
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
        for name, p in model.named_parameters()
    }


def assert_close(values, wanted, tolerance):
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(values[name], value, rtol=tolerance, atol=tolerance, msg=name)


def changed(values, model):
    before = values_of(model)
    return {name for name, value in values.items() if not torch.equal(value, before[name])}


@case
def ddp_trains_as_one_process(rank):
    """The bits of our own single process, and PEFT's numbers."""
    for adapters in ("one", "three", "dora"):
        model = model_of(adapters, targets=TARGETS)
        together = train_together(model, nn.parallel.DistributedDataParallel(model), rank)
        assert_close(together, train_alone(model_of(adapters, targets=TARGETS)), 0)
        theirs = train_alone(model_of(adapters, False, targets=TARGETS))
        assert_close(together, theirs, 1e-5)
        trained = changed(theirs, model_of(adapters, targets=TARGETS))
        assert len(trained) >= 6 and all("lora_" in name for name in trained)


@case
def ddp_with_dropout_draws_each_process_own_mask(rank):
    seeds = [11, 12]
    model = model_of("one", lora_dropout=0.4)
    forward = nn.parallel.DistributedDataParallel(model)
    together = train_together(model, forward, rank, seeds=seeds)
    assert_close(together, train_alone(model_of("one", lora_dropout=0.4), seeds=seeds), 0)


def sharded(model):
    """By LoRA layers, which FSDP2 gives a class of its own, and the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LoraLayer):
            fully_shard(module)
    return fully_shard(model)


@case
def fsdp2_trains_as_one_process(rank):
    """accelerate, then fully_shard: the op computes."""
    for adapters in ("one", "three", "dora"):
        model = sharded(model_of(adapters, targets=TARGETS))
        calls = []
        patches = [
            mock.patch.object(module, "lora_linear", counting(module.lora_linear, calls))
            for module in (linear, quick)
        ]
        with patches[0], patches[1]:
            together = train_together(model, model, rank)
        assert len(calls) == (0 if adapters == "dora" else 2 * len(TARGETS))
        assert_close(together, train_alone(model_of(adapters, targets=TARGETS)), 1e-6)
        assert_close(together, train_alone(model_of(adapters, False, targets=TARGETS)), 1e-5)


@case
def fsdp2_by_the_root_alone(rank):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(model_of("three"))
    together = train_together(model, model, rank)
    assert_close(together, train_alone(model_of("three")), 1e-6)


@case
def fsdp2_in_mixed_precision(rank):
    """Parameters and reductions in bfloat16: near float32's, every gradient there."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(model_of("one", targets=TARGETS), mp_policy=policy)
    together = train_together(model, model, rank)
    assert_close(together, train_alone(model_of("one", targets=TARGETS)), 2e-2)


def counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(None)
        return function(*args, **kwargs)

    return counted
