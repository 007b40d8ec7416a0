"""How often torch.compile compiles a layer of either kind again.

The tests hold it to these numbers:

    another batch size              once more, then never (once in all with dynamic=True)
    other values of the adapters    never: copy_, load_state_dict, a new Parameter
    set_adapter                     once for each choice of names, in their order; never again for
                                    a choice that was seen
    no_grad, inference_mode         once
    another adapter for each row    never
"""

from itertools import pairwise

import pytest
import torch
from four_bit_experts import parts_of
from helpers import F32, F64
from step_helpers import run
from torch import nn

import lora_ext
from contract.cases import EXPERTS, LAYERS, QUANTISED, assert_as_eager, assert_close, cases
from contract.row_helpers import assert_equal_steps, batch, differentiated, run_alone

MIXED = ("linear", "conv1d", "conv2d", "subclass", "embedding")
ABC = ["a", "b", "c"]

pytestmark = pytest.mark.usefixtures("forget_graphs")


def check(subject, adapters, compiled, x):
    """A step of the graph is one of the plain model; returns y."""
    eager = run(subject.model, subject.model, x)
    assert_as_eager(subject, adapters, run(compiled, subject.model, x), eager)
    return eager["y"]


@pytest.mark.parametrize("dropout", [0.4, {"a": 0.4, "b": 0.6, "c": 0.0}], ids=["same", "other"])
@cases(["linear", "conv1d", "subclass"], ["one", "three", "dora"])
def test_batch_sizes_compile_once_more(counter, kind, layer, adapters, dropout):
    subject = kind.make(layer, adapters, dropout=dropout)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    for count, rows in ((1, 8), (2, 60), (2, 51), (2, 130), (2, 700), (2, 8)):
        check(subject, adapters, compiled, subject.x(rows))
        assert counter.frame_count == count, rows


@cases(["net", "linear", "subclass", *QUANTISED, *EXPERTS], ["one", "three"])
def test_batch_sizes_with_dynamic_shapes_never_recompile(counter, kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout=0.4)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True, dynamic=True)
    counts, calls = [], [part.calls for part in parts_of(subject.model)]
    for rows in (8, 60, 6, 51, 130, 700):
        check(subject, adapters, compiled, subject.x(rows))
        counts.append(counter.frame_count)
    assert calls == [part.calls for part in parts_of(subject.model)]  # of 4 bits, all at once
    # The first call may start over: it makes symbols of floats, and finds that they are constants.
    assert counts[0] <= 2 and set(counts) == {counts[0]}


@cases([*LAYERS, "subclass"], ["one"])
def test_other_values_do_not_recompile(counter, kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout=0.4)
    model, x = subject.model, subject.x()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first, second = subject.factors("a")

    def other_values():
        return {key: torch.randn_like(value) for key, value in model.state_dict().items()}

    def replace():
        path = next(key for key, p in model.named_parameters() if p is second)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Parameter(torch.randn_like(second)))

    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    results = [check(subject, adapters, compiled, x)]
    for change in (
        lambda: second.data.copy_(torch.randn_like(second)),
        lambda: model.load_state_dict(other_values()),
        lambda: setattr(first, "data", torch.randn_like(first)),
        replace,
        lambda: model.load_state_dict(other_values(), assign=True),
    ):
        change()
        results.append(check(subject, adapters, compiled, x))
        assert trained == {key: p.requires_grad for key, p in model.named_parameters()}
        assert counter.frame_count == 1
    for one, other in pairwise(results):
        assert not torch.equal(one, other)


@cases(["linear", "conv2d", "embedding", "subclass", "gguf", "experts, plain"], ["three"])
def test_switching_compiles_once_for_each_choice(counter, kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout=0.4)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    counts = []
    # The last choice adds up in another order.
    for names in (["a"], ["b"], ["a"], ["a", "b"], ["b"], ["a", "b", "c"], ["c"], ["a", "b"]):
        subject.set_adapter(names)
        check(subject, adapters, compiled, subject.x())
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 3, 3, 4, 5, 5]
    subject.set_adapter(["b", "a"])
    check(subject, adapters, compiled, subject.x())
    assert counter.frame_count == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@cases([*LAYERS, "subclass", *QUANTISED], ["one", "three"])
def test_without_grad_and_back(counter, kind, layer, adapters, mode):
    subject = kind.make(layer, adapters)
    x = subject.x()
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    for _ in range(2):
        with mode():
            y, wanted = compiled(x), subject(x)
        assert_as_eager(subject, adapters, {"y": y}, {"y": wanted})
        check(subject, adapters, compiled, x)
    assert counter.frame_count == 2


@pytest.mark.parametrize("before", [False, True], ids=["", "called before"])
@cases(["net", *MIXED, *QUANTISED, "experts, plain"], ["three"])
def test_another_index_does_not_recompile_sglang_28371(counter, kind, layer, adapters, before):
    """A graph must not bake in which adapters were in the batch that it was made of, nor that there
    was none."""
    dtype, tolerance = (F32, 1e-5) if layer in QUANTISED else (F64, 1e-10)
    subject = kind.make(layer, adapters, dtype)
    x = batch(subject, 18, dtype)  # more than GGUF's kernels for few rows take
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    if before:
        compiled(x)
    seen = []
    for index in ([0, -1, 2, 1, 0, 2], [1, 1, 1, 1, 1, 1], [-1] * 6, [2, 0, 1, 2, 0, 1]):
        rows = torch.tensor(3 * index, dtype=torch.int32)

        def mixed(x, rows=rows):
            with lora_ext.use_adapters(subject.model, ABC, rows):
                return compiled(x)

        found = differentiated(subject, x, mixed)
        assert_equal_steps(found, run_alone(subject, ABC, x, rows), tolerance)
        seen.append(counter.frame_count)
    again = layer == "int8"  # whose state is made in a forward
    assert seen == [1 + before, *[1 + before + again] * 3]
    assert_close(compiled(x), subject(x), rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 2 + before + again
