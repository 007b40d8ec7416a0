"""`use_adapters` in compiled graphs, in checkpointed regions and in two processes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from row_helpers import assert_equal_steps, differentiated, run
from torch.utils.checkpoint import checkpoint

import lora_ext
from contract.adapters import DIFFERENT
from contract.cases import LINEAR, cases

GROUPS = ["a", "b", "c"]


def index_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32)


# ---- torch.compile ----


@cases(["net", "linear", "conv2d", "embedding", "subclass"], ["three"])
def test_another_index_is_no_other_graph(forget_graphs, counter, kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    for seed in range(3):
        index = index_of(len(x), seed)
        wanted = run(subject, GROUPS, x, index)

        def forward(x, index=index):
            with lora_ext.use_adapters(subject.model, GROUPS, index):
                return compiled(x)

        assert_equal_steps(differentiated(subject, x, forward), wanted, 1e-5)
        assert counter.frame_count == 1
    with lora_ext.use_adapters(subject.model, ["a", "b"], index_of(len(x)).clamp(max=1)):
        compiled(x)
    assert counter.frame_count == 2
    outside = subject(x)
    torch.testing.assert_close(compiled(x), outside, rtol=1e-5, atol=1e-5)


@cases(["linear", "subclass"], ["three"])
def test_compiled_by_token_and_with_dropout(forget_graphs, counter, kind, layer, adapters):
    """The masks of a graph are those of eager mode, from the same seed."""
    subject = kind.make(layer, adapters, dropout=DIFFERENT)
    x = subject.x(60).unflatten(0, (12, 5))
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    for seed in range(3):
        index = index_of(60, seed).view(12, 5)
        torch.manual_seed(seed)
        wanted = run(subject, GROUPS, x, index)

        def forward(x, index=index, seed=seed):
            torch.manual_seed(seed)
            with lora_ext.use_adapters(subject.model, GROUPS, index):
                return compiled(x)

        assert_equal_steps(differentiated(subject, x, forward), wanted, 1e-5)
    assert counter.frame_count == 1


# ---- activation checkpointing ----


def checkpointed(model, x, use_reentrant):
    return checkpoint(lambda x: F.relu(model(x)), x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, DIFFERENT], ids=["no dropout", "dropout"])
@cases([*LINEAR, "conv2d", "subclass"], ["three"])
def test_backward_within_the_block_of_a_checkpoint(kind, layer, adapters, dropout, use_reentrant):
    subject = kind.make(layer, adapters, dropout=dropout)
    x, model = subject.x(), subject.model
    index = index_of(len(x))
    found = []
    for forward in (
        lambda x: F.relu(model(x)),
        lambda x: checkpointed(model, x, use_reentrant),
    ):
        torch.manual_seed(5)
        with lora_ext.use_adapters(model, GROUPS, index):
            found.append(differentiated(subject, x, forward))
    assert_equal_steps(found[1], found[0], 0.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entered", ["once", "again", "within another", "another after it"])
@cases(["linear", "conv1d", "conv2d", "subclass"], ["three"])
def test_backward_after_the_block_of_a_checkpoint_is_an_error(
    kind, layer, adapters, use_reentrant, entered
):
    """It would compute the active adapters in the place of those of the rows."""
    subject = kind.make(layer, adapters)
    x, model = subject.x().requires_grad_(), subject.model
    names = ["a"] * len(x)
    blocks = contextlib.ExitStack()
    if entered == "again":
        run(subject, names, subject.x())
    if entered == "within another":
        blocks.enter_context(lora_ext.use_adapters(model, ["b"] * len(x)))
    with lora_ext.use_adapters(model, names):
        y = checkpointed(model, x, use_reentrant)
    if entered == "another after it":
        blocks.enter_context(lora_ext.use_adapters(model, ["b"] * len(x)))
    with (
        blocks,
        pytest.raises(RuntimeError, match=r"within the block of its forward.*call backward\(\)"),
    ):
        y.sum().backward()
    subject(x)  # the next forward is one without a block


@cases(["linear", "subclass"], ["three"])
def test_a_forward_after_the_block_has_its_own_checkpoint(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x, model = subject.x().requires_grad_(), subject.model
    wanted = differentiated(subject, x, model)
    run(subject, ["a"] * len(x), x)
    found = differentiated(subject, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_equal_steps(found, wanted, 0.0)
