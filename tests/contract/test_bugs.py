"""Bugs that other projects' LoRA layers, models and integrations with PEFT had, as tests of both
kinds of layer.

Names and docstrings have the peers' public reports. `test_peer_bugs` has those of kernels,
`test_bugs_in_steps` those of forward and backward.
"""

import copy
import gc
import weakref

import pytest
import torch
from peft_helpers import step

import lora_ext
from contract.adapters import DIFFERENT
from contract.cases import cases, every_kind

# ---- which path runs ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@cases(["linear"], ["one", "lora_bias"])
def test_axolotl_3806_unsloth_23_2319_dropout_and_bias_keep_the_fused_path(
    kind, layer, adapters, dropout, training
):
    """The fused path was skipped in silence as soon as there was dropout or a bias."""
    subject = kind.make(layer, adapters, dropout=dropout)
    subject.model.train(training)
    assert subject.paths() == {"fused"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        subject(subject.x())
    calls = [event.name for event in profile.events()]
    assert calls.count("lora_ext::lora") >= 1
    assert calls.count("aten::linear") <= 1  # the base's product, inside the op
    assert "aten::dropout" not in calls


@pytest.mark.parametrize("training", [False, True])
@every_kind
def test_axolotl_3806_the_reason_is_told(kind, training):
    """Adapters that differ in dropout cannot be one call, and only in training."""
    subject = kind.make("linear", "three", dropout=DIFFERENT)
    subject.model.train(training)
    ((path, reason),) = subject.reasons()
    assert path == ("added" if training else "fused")
    assert ("differ in dropout" in reason) == training


# ---- compiled ----


@cases(["linear"], ["one", "two"])
def test_pytorch_141039_requires_grad_differs(forget_graphs, counter, kind, layer, adapters):
    """A graph broke where the requires_grad of the adapters differed from that at compile time."""
    subject = kind.make(layer, adapters)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    for _ in range(3):
        for trainable in (True, False):
            for needs_dx in (True, False):
                for parameter in subject.trained():
                    parameter.requires_grad_(trainable)
                x = subject.x().requires_grad_(needs_dx)
                y = compiled(x)
                torch.testing.assert_close(y, subject(x))
                # A bias of the base may be trained beside the adapters.
                is_trained = any(p.requires_grad for p in subject.model.parameters())
                assert y.requires_grad == (needs_dx or is_trained)
                if y.requires_grad:
                    y.sum().backward()
    assert counter.frame_count <= 4  # and none in the second and third round


# ---- lifetimes ----


@cases(["net", "linear"], ["two"])
def test_torchtune_904_what_is_deleted_is_freed(kind, layer, adapters):
    """A cache on methods kept every model alive. Without the collector: there are no cycles."""
    subject = kind.make(layer, adapters)
    step(subject.model, subject.x(6))
    str(lora_ext.explain(subject.model))
    factors = [weakref.ref(parameter) for parameter in subject.factors("b")]
    assert len(factors) == 2 * len(subject.layers)
    gc.collect()
    gc.disable()
    try:
        subject.delete("b")
        assert [ref() for ref in factors] == [None] * len(factors)
        weights = [weakref.ref(parameter) for parameter in subject.model.parameters()]
        del subject
        assert [ref() for ref in weights] == [None] * len(weights)
    finally:
        gc.enable()


@every_kind
def test_1000_steps_keep_nothing(kind):
    """Neither tensors nor objects pile up over calls."""
    subject = kind.make("linear", dropout=0.1)
    x = subject.x(2)
    for _ in range(50):
        subject(x).sum().backward()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        subject(x).sum().backward()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert subject.holding(copy.deepcopy(subject.model)).reasons() == subject.reasons()
