"""Experts in two processes on the CPU: DistributedDataParallel, and FSDP2 with the experts' module
as a unit of its own, train as one process does.

What both compute is compared with the two halves of the batch in one process, whose gradients are
averaged: the same sums, so that the bits agree.
"""

from unittest import mock

import torch
import two_processes
from helpers import BF16, F32
from mixture_helpers import mixture, peft_mixture, randomized, some_ids
from torch import nn
from two_processes import gradients_of, plain_name, whole

import lora_ext
import lora_ext.nn.experts
import lora_ext.peft.experts
from lora_ext import LoraConfig, apply_lora

case, test_two_processes = two_processes.cases(__name__)
STEPS = 2


def make_accelerated(kind, dtype):
    return lora_ext.accelerate(peft_mixture(kind, dtype=dtype))


def make_applied(kind, dtype):
    config = LoraConfig(["experts", "q_proj"], r=3, lora_alpha=6)
    return randomized(apply_lora(mixture(kind, dtype=dtype), config))


def train(model, ranks, forward=None):
    batches = some_ids(shape=(STEPS, 8, 7))
    forward = forward or model
    return two_processes.train(model, batches, ranks, lambda ids: forward(ids).logits)


def assert_trains_as_one_process(wrap, rank):
    """In each step each layer of experts is one call of `lora_experts`."""
    for make, module in (
        (make_accelerated, lora_ext.peft.experts),
        (make_applied, lora_ext.nn.experts),
    ):
        for kind, dtype in (("gpt_oss", F32), ("qwen3_moe", BF16)):
            model, alone = make(kind, dtype), make(kind, dtype)
            before = {n: p.detach().clone() for n, p in alone.named_parameters()}
            expected = train(alone, range(two_processes.WORLD))
            wrapped = wrap(model)
            with mock.patch.object(module, "lora_experts", wraps=module.lora_experts) as calls:
                gradients = train(model, [rank], wrapped)
            assert calls.call_count == STEPS * 2
            assert gradients.keys() == expected.keys() and len(expected) == 2 * 3 * 2
            values = dict(alone.named_parameters())
            for name, parameter in model.named_parameters():
                name = plain_name(name)
                assert torch.equal(whole(parameter), values[name]), name
                is_trained = not torch.equal(values[name], before[name])
                assert is_trained == (name in expected), name
            for name, gradient in gradients_of(alone).items():
                assert torch.equal(gradients[name], gradient), name


@case
def ddp(rank):
    assert_trains_as_one_process(nn.parallel.DistributedDataParallel, rank)


@case
def fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for path, module in list(model.named_modules()):
            if path.endswith("mlp.experts"):
                fully_shard(module)
        assert any(hasattr(p, "full_tensor") for n, p in model.named_parameters() if "down" in n)
        return fully_shard(model)

    assert_trains_as_one_process(shard, rank)
