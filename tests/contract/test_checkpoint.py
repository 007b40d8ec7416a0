"""Both kinds of layer in checkpointed regions: the recomputation draws the same masks."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F32, F64, short
from step_helpers import assert_same, differing, run, under_autocast
from torch.utils.checkpoint import checkpoint

from contract.adapters import DIFFERENT
from contract.cases import EXPERTS, MATRIX, QUANTISED, assert_as_eager, cases

EVERYTHING = (*MATRIX, "subclass", *QUANTISED, *EXPERTS)

each_dropout = pytest.mark.parametrize(
    "dropout", [0.0, 0.4, DIFFERENT], ids=["no dropout", "same dropout", "different dropout"]
)


def region_of(model):
    return lambda x: F.relu(model(x))


def checkpointed(region, use_reentrant=False):
    return lambda x: checkpoint(region, x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_dropout
@cases(EVERYTHING, ["one", "three", "dora", "lora_bias"])
def test_the_same_bits(device, kind, layer, adapters, dropout, use_reentrant):
    subject = kind.make(layer, adapters, dropout=dropout)
    model, x = subject.model.to(device), subject.x().to(device)
    region = region_of(model)
    plain = run(region, model, x)
    assert all(
        plain[name].abs().max() > 0 for name in dict(model.named_parameters()) if "lora" in name
    )
    assert ("dx" in differing(run(region, model, x, seed=8), plain)) == (dropout != 0)
    step = checkpointed(region, use_reentrant)
    # Before it is repeated another forward draws other seeds.
    assert_same(run(lambda x: (step(x), region(x))[0], model, x), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@cases(["linear", "conv2d", "subclass"], ["one", "three", "dora"])
def test_under_autocast(kind, layer, adapters, use_reentrant):
    """Backward, outside the region, recomputes under the autocast of forward."""
    subject = kind.make(layer, adapters, dropout=DIFFERENT)
    model, x = subject.model, subject.x()

    region = region_of(model)
    plain = run(under_autocast(region, "cpu"), model, x)
    assert plain["y"].dtype == BF16
    repeated = under_autocast(checkpointed(region, use_reentrant), "cpu")
    assert_same(run(repeated, model, x), plain)


@pytest.mark.parametrize("dtype", [F32, F64], ids=short)
@each_dropout
@cases(["linear", "conv2d", "subclass"], ["one", "three", "dora"])
def test_peft_3020_compile_checkpoint_and_dropout(
    forget_graphs, device, counter, kind, layer, adapters, dropout, dtype
):
    """The three together failed; here they give the gradients of the plain layer, in one graph."""
    subject = kind.make(layer, adapters, dtype, dropout=dropout)
    model, x = subject.model.to(device), subject.x(dtype=dtype).to(device)
    plain = run(region_of(model), model, x)
    step = checkpointed(region_of(model))
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    assert_same(run(step, model, x), plain)
    assert_as_eager(subject, adapters, run(compiled, model, x), plain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
@cases(["linear", "subclass"], ["three", "dora"])
def test_checkpoint_of_a_compiled_region(
    forget_graphs, counter, kind, layer, adapters, use_reentrant
):
    subject = kind.make(layer, adapters, dropout=DIFFERENT)
    model, x = subject.model, subject.x()
    region = torch.compile(region_of(model), backend=counter, fullgraph=True)
    found = run(checkpointed(region, use_reentrant), model, x)
    assert_as_eager(subject, adapters, found, run(region_of(model), model, x))
