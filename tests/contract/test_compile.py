"""Under torch.compile both kinds of layer are one graph with eager's bits and masks.

`test_recompile` says how often they compile.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import BF16, F32, F64, short
from step_helpers import assert_same, compiled_under_autocast, differing, run, under_autocast
from torch._subclasses.fake_tensor import FakeTensorMode

from contract.adapters import DIFFERENT
from contract.cases import LAYERS, QUANTISED, assert_as_eager, assert_close, cases

pytestmark = pytest.mark.usefixtures("forget_graphs")

EVERYTHING = (*LAYERS, "subclass", *QUANTISED)
BIASES = "experts, transposed, biases, interleaved"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
@cases(EVERYTHING, ["one", "three", "dora", "lora_bias"])
def test_one_graph_with_eagers_bits(device, counter, kind, layer, adapters, dtype, dropout):
    subject = kind.make(layer, adapters, dtype, dropout=dropout)
    model, x = subject.model.to(device), subject.x(dtype=dtype).to(device)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    eager = run(model, model, x)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(eager[name] is not None and eager[name].abs().max() > 0 for name in trained)
    found = run(compiled, model, x)
    assert_as_eager(subject, adapters, found, eager)
    assert_same(run(compiled, model, x), found)
    # Another seed draws other masks, by eager's generator, and finds the graph.
    assert_as_eager(
        subject, adapters, run(compiled, model, x, seed=8), run(model, model, x, seed=8)
    )
    assert counter.frame_count == 1


@cases(["net"], ["one", "three", "dora"])
def test_a_whole_model_is_one_graph(device, counter, kind, layer, adapters):
    subject = kind.make(layer, adapters, F64, dropout=0.4)
    model, x = subject.model.to(device), subject.x(6).to(device)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_as_eager(subject, adapters, run(compiled, model, x), run(model, model, x), slack=10)
    assert counter.frame_count == 1


@cases(["linear", "conv2d", "subclass", *QUANTISED, "experts, plain"], ["one", "three", "dora"])
def test_dropout_changes_with_the_seed_in_training_alone(counter, kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout=DIFFERENT)
    model, x = subject.model, subject.x()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert "y" in differing(run(compiled, model, x, seed=1), run(compiled, model, x, seed=2))
    assert_as_eager(subject, adapters, run(compiled, model, x), run(model, model, x))
    model.eval()
    assert_same(run(compiled, model, x, seed=1), run(compiled, model, x, seed=2))
    assert_as_eager(subject, adapters, run(compiled, model, x), run(model, model, x))
    # bitsandbytes makes its state of 8 bits in a forward in eval.
    assert counter.frame_count == 2 + (layer == "int8")


def merge(subject):
    subject.model.eval()
    subject.merge()


# A function that brings a subject into the state, or returns a context in which it is.
STATES = {
    "merged": merge,
    "none active": lambda subject: subject.set_adapter([]),
    "one of three": lambda subject: subject.set_adapter(["b"]),
    "disabled": lambda subject: subject.disabled(),
}


@pytest.mark.parametrize("state", STATES)
@cases(["linear", "embedding", "subclass"], ["three"])
def test_one_graph_in_every_state(device, counter, kind, layer, adapters, state):
    subject = kind.make(layer, adapters, dropout=0.4)
    model, x = subject.model.to(device), subject.x().to(device)
    with STATES[state](subject) or nullcontext():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert_as_eager(subject, adapters, run(compiled, model, x), run(model, model, x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cxx_compiler")
@cases(["linear", "conv2d", "subclass", *QUANTISED, BIASES], ["one", "three", "dora"])
def test_inductor(kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout=DIFFERENT)
    model, x = subject.model, subject.x()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = run(torch.compile(model, fullgraph=True), model, x)
    for name, value in run(model, model, x).items():
        assert (value is None) == (compiled[name] is None), name
        if value is not None:
            limit = 1e-5 * max(1.0, value.abs().max().item())
            assert_close(compiled[name], value, rtol=1e-5, atol=limit, msg=name)


@pytest.mark.parametrize("is_compiled", [False, True])
@cases(["linear"], ["one", "dora"])
def test_compiled_autograd(counter, kind, layer, adapters, is_compiled):
    subject = kind.make(layer, adapters, dropout=0.4)
    model, x = subject.model, subject.x()
    plain = run(model, model, x)
    forward = torch.compile(model, backend=counter, fullgraph=True) if is_compiled else model
    compile_backward = partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compile_backward):
        assert_as_eager(subject, adapters, run(forward, model, x), plain)


# ---- autocast ----


@pytest.mark.parametrize("inside", [True, False])
@cases(["linear", "conv1d", "embedding", "merged_linear"], ["one", "dora", "lora_bias"])
def test_compiled_under_autocast(device, counter, kind, layer, adapters, inside):
    subject = kind.make(layer, adapters, dropout=0.4)
    model, x = subject.model.to(device), subject.x().to(device)
    eager = run(under_autocast(model, device), model, x)
    assert eager["y"].dtype == (F32 if layer == "embedding" else BF16)
    compiled = compiled_under_autocast(model, device, counter, inside)
    assert_as_eager(subject, adapters, run(compiled, model, x), eager, rounded_to=BF16)
    assert counter.frame_count == 1


@cases(["linear", "subclass"], ["one", "three"])
def test_autocast_state_is_part_of_the_guards(counter, kind, layer, adapters):
    subject = kind.make(layer, adapters)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    x = subject.x()
    for enabled in (True, False, True, False):
        with torch.autocast("cpu", BF16, enabled=enabled):
            y = compiled(x)
            assert torch.equal(y, subject(x))
        assert y.dtype == (BF16 if enabled else F32)
    assert counter.frame_count == 2


# ---- without values ----


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@cases(["net", *LAYERS, "subclass"], ["one", "three", "dora", "lora_bias", "rslora"])
def test_no_read_of_the_device(kind, layer, adapters, dtype, dropout):
    """A step on tensors without values: what asked for one, a host sync on a GPU, would raise.

    So a step can be captured in a CUDA graph.
    """
    subject = kind.make(layer, adapters, dtype, dropout=dropout)
    shape = subject(subject.x(dtype=dtype)).shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = subject(subject.x(dtype=dtype))
        y.sum().backward()
    assert y.shape == shape
