"""Our own layers in checkpointed regions beyond `contract/test_checkpoint`: layers that PEFT
has not, selective checkpointing, names."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layer_helpers import randomize
from step_helpers import IN, ROWS, Pair, assert_same, make, run
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_ext
from lora_ext import LoraConfig, apply_lora

pytestmark = pytest.mark.usefixtures("forget_graphs")


def save_products(_context, op, *_args, **_kwargs):
    """A policy of selective checkpointing: our products are kept, the rest is recomputed."""
    if op is torch.ops.lora_ext.lora_forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint(counter):
    module, x = make("linear", 0.4)
    contexts = partial(create_selective_checkpoint_contexts, save_products)

    def region(x):
        return F.relu(module(x))

    def step(x):
        return checkpoint(region, x, use_reentrant=False, context_fn=contexts)

    plain = run(region, module, x)
    assert_same(run(step, module, x), plain)
    assert_same(run(torch.compile(step, backend=counter, fullgraph=True), module, x), plain)


def test_checkpoint_wrapper_is_not_in_the_names(tmp_path):
    """torch leaves it out of state dicts, and so do all functions that go by names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from lora_ext.adapters import load_adapter, save_adapter

    def make_model():
        torch.manual_seed(0)
        model = nn.Sequential(Pair(), Pair(), nn.Linear(IN, 2))
        config = LoraConfig("all-linear", r=2, lora_dropout=0.4, modules_to_save=("2",))
        return randomize(apply_lora(model, config))

    plain, wrapped = make_model(), make_model()
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    wrapped[1].up = checkpoint_wrapper(wrapped[1].up)
    wrapped[2] = checkpoint_wrapper(wrapped[2])
    x = torch.randn(ROWS)
    assert torch.equal(run(wrapped, wrapped, x)["y"], run(plain, plain, x)["y"])
    for states in (
        [lora_ext.models.lora_state_dict(model, bias="lora_only") for model in (plain, wrapped)],
        [lora_ext.loralib.loralib_state_dict(model) for model in (plain, wrapped)],
    ):
        assert len(states[0]) >= 8
        assert_same(*states)
    assert [row.name for row in lora_ext.explain(wrapped)] == [
        row.name for row in lora_ext.explain(plain)
    ]
    save_adapter(wrapped, tmp_path)
    loaded = nn.Sequential(Pair(), Pair(), nn.Linear(IN, 2))
    loaded.load_state_dict(plain_weights(plain))
    load_adapter(loaded, tmp_path)
    assert_same(dict(loaded.state_dict()), dict(plain.state_dict()))


def plain_weights(model):
    return {key: value for key, value in model.state_dict().items() if ".lora_" not in key}
