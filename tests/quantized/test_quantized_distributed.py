"""Accelerated PEFT models over quantised layers in two processes on the CPU: DDP and FSDP2.

What both compute is compared with the two halves of the batch in one process, whose gradients are
averaged: the same sums, so that the bits agree.
"""

import pytest
import torch
import two_processes
from helpers import BF16, F32
from peft_helpers import paths
from quantized_models import MAKERS, bnb_four_bits, is_installed, make_x, quantized_net
from torch import nn
from two_processes import WORLD, CallsOfOps, in_bfloat16, train

import lora_ext

case, test_two_processes = two_processes.cases(__name__)

STEPS = 2


KINDS = [kind for kind in MAKERS if is_installed(kind)]
if not KINDS:
    pytest.skip("no library that quantises is installed", allow_module_level=True)


def accelerated(kind, dtype=F32, **words):
    model = lora_ext.accelerate(quantized_net(kind, dtype, **words))
    assert set(paths(model).values()) == {"fused"}
    return model


def batches(dtype=F32):
    return make_x(dtype, 8 * STEPS).chunk(STEPS)


def assert_trained_alike(model, found, alone, seeds=None, tolerance=0.0, dtype=F32):
    wanted = train(alone, batches(dtype), range(WORLD), seeds=seeds)
    assert len(found) == 8
    two_processes.assert_trained_alike(model, found, alone, wanted, tolerance, names=[*wanted])


def parallel(kind, model):
    """torchao's tensors have no views by which the values of one process could be sent."""
    if kind.startswith("torchao"):
        with pytest.raises(NotImplementedError, match=r"aten\.view"):
            nn.parallel.DistributedDataParallel(model)
    return nn.parallel.DistributedDataParallel(model, init_sync=not kind.startswith("torchao"))


def fused_calls(function):
    with CallsOfOps() as calls:
        result = function()
    return result, calls.of["lora_forward"]


@case
def ddp_trains_as_one_process(rank):
    for kind in KINDS:
        model, alone = accelerated(kind), accelerated(kind)
        forward = parallel(kind, model)
        found, calls = fused_calls(lambda m=model, f=forward: train(m, batches(), [rank], f))
        assert calls == 4 * STEPS, kind
        assert_trained_alike(model, found, alone)


@case
def ddp_with_checkpoints_and_dropout(rank):
    seeds = [11, 12]
    for kind in KINDS:
        model, alone = (accelerated(kind, lora_dropout=0.3) for _ in range(2))
        model.base_model.model.reentrant = False
        found = train(model, batches(), [rank], parallel(kind, model), seeds=seeds)
        assert_trained_alike(model, found, alone, seeds)


def shard(model, **options):
    return two_processes.shard(model, model.base_model.model.blocks, **options)


def bases(model):
    """The parameters that are not trained."""
    return {p for p in model.parameters() if not p.requires_grad}


@case
def fsdp2_that_leaves_the_bases_whole(rank):
    for kind in KINDS:
        model, alone = accelerated(kind), accelerated(kind)
        shard(model, ignored_params=bases(model))
        found, calls = fused_calls(lambda m=model: train(m, batches(), [rank]))
        assert calls == 4 * STEPS, kind
        assert_trained_alike(model, found, alone)


def sharded_like_one_process(rank, kind, make=None, dtype=F32, tolerance=0.0, **options):
    model, alone = (accelerated(kind, dtype, make=make) for _ in range(2))
    shard(model, **options)
    found, calls = fused_calls(lambda: train(model, batches(dtype), [rank]))
    assert calls == 4 * STEPS, kind
    assert_trained_alike(model, found, alone, tolerance=tolerance, dtype=dtype)


@case
def fsdp2_that_shards_the_bases(rank):
    """bitsandbytes' codes of 4 bits in any storage, and HQQ's: gathered for each block, whose
    backward gathers them again."""
    if is_installed("bnb nf4"):
        for storage in (torch.uint8, BF16, F32):
            sharded_like_one_process(
                rank, "bnb nf4", lambda layer, dtype, to=storage: bnb_four_bits(layer, dtype, to)
            )
    if is_installed("hqq"):
        sharded_like_one_process(rank, "hqq")


@case
def fsdp2_that_shards_the_bases_in_mixed_precision(rank):
    if not is_installed("bnb nf4"):
        return

    def stored_as(storage):
        return lambda layer, dtype: bnb_four_bits(layer, dtype, storage)

    words = {"dtype": BF16, "tolerance": 0.1, **in_bfloat16()}
    for storage in (torch.uint8, BF16):
        sharded_like_one_process(rank, "bnb nf4", stored_as(storage), **words)
    with pytest.raises(RuntimeError, match="expected codes of 4096 elements, but got 2048"):
        sharded_like_one_process(rank, "bnb nf4", stored_as(F32), **words)


@case
def bases_that_fsdp2_cannot_shard(rank):
    """The libraries' own errors, which docs/distributed.md names."""
    for kind in KINDS:
        if kind.startswith("torchao"):
            with pytest.raises(NotImplementedError, match=r"aten\.split"):
                shard(accelerated(kind))
        elif kind == "bnb int8":
            model = shard(accelerated(kind))
            with pytest.raises(AttributeError, match="'Parameter' object has no attribute 'CB'"):
                model(make_x())
