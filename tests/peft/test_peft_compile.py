"""Accelerated models under torch.compile, torch.export, and without reads of the device.

How often torch.compile compiles (the tests below hold it to these numbers):

    another batch size              once more, then never (once in all with dynamic=True)
    hotswap_adapter                 never, after prepare_model_for_compiled_hotswap: other values,
                                    other ranks up to the target, other scalings
    set_adapter, set_scale          once for each choice, as PEFT
    accelerate, decelerate          once for each
"""

import pytest
import torch
from helpers import BF16, F32, F64, short
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_helpers import (
    ADAPTERS,
    HEIGHT,
    WIDTH,
    Net,
    accelerated,
    layer_model,
    make_ids,
    make_x,
    net,
    peft_model,
    randomize,
    step,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_ext

pytestmark = pytest.mark.usefixtures("forget_graphs")

CASES = [
    (kind, adapters)
    for kind in ("linear", "conv1d", "embedding")
    for adapters in ADAPTERS
    if (kind, adapters) != ("embedding", "lora_bias")
]


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(1.0, value.abs().max().item())
        limit = tolerance * scale
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=limit, msg=name)


def compiled_step(model, function, x):
    """`step` of a compiled function, with the names of the plain model."""

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return function(x)

    return {name.removeprefix("inner."): value for name, value in step(Caller(), x).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=short)
@pytest.mark.parametrize(("kind", "adapters"), CASES)
def test_one_graph(counter, kind, adapters, dtype, dropout):
    """fullgraph, forward and backward, the same masks; the bits may differ where eager has
    blocks."""
    model = lora_ext.accelerate(layer_model(kind, adapters, dtype, lora_dropout=dropout))
    x = make_x(kind, dtype)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = compiled_step(model, compiled, x)
    assert_close(found, step(model, x), 1e-11 if dtype == F64 else 2e-2)
    assert counter.frame_count == 1
    again = compiled_step(model, compiled, x)
    assert torch.equal(again["y"], found["y"])
    assert counter.frame_count == 1


@pytest.mark.parametrize("base", ["hooked", "subclass"])
def test_one_graph_around_a_base_that_is_called(counter, base):
    class Other(nn.Linear):
        pass

    torch.manual_seed(0)
    kind = Other if base == "subclass" else nn.Linear
    words = ADAPTERS["three"]
    model = peft_model(nn.Sequential(kind(WIDTH, HEIGHT)), words, ["0"], F64, lora_dropout=0.3)
    lora_ext.accelerate(model)
    if base == "hooked":
        model.base_model.model[0].base_layer.register_forward_hook(lambda m, i, y: 2 * y)
    x = make_x("linear", F64)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled_step(model, compiled, x), step(model, x), 1e-11)
    assert counter.frame_count == 1


@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
def test_inductor(adapters):
    model = lora_ext.accelerate(layer_model("linear", adapters, F32))
    x = make_x("linear")
    compiled = torch.compile(model, fullgraph=True)
    assert_close(compiled_step(model, compiled, x), step(model, x), 1e-5)


def test_a_whole_model_is_one_graph(counter):
    model = lora_ext.accelerate(net("three", F64, lora_dropout=0.2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled_step(model, compiled, make_ids()), step(model, make_ids()), 1e-10)
    assert counter.frame_count == 1


@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_batch_sizes_compile_once_more(counter, kind, adapters):
    model = lora_ext.accelerate(layer_model(kind, adapters, F64, lora_dropout=0.2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for count, rows in ((1, 8), (2, 60), (2, 51), (2, 700), (2, 8)):
        x = make_x(kind, F64, rows)
        assert_close(compiled_step(model, compiled, x), step(model, x), 1e-10)
        assert counter.frame_count == count, rows


def test_batch_sizes_with_dynamic_shapes_never_recompile(counter):
    model = lora_ext.accelerate(net("one", F64, lora_dropout=0.2))
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows in (8, 6, 51, 13, 70):
        ids = make_ids(rows)
        assert_close(compiled_step(model, compiled, ids), step(model, ids), 1e-10)
        counts.append(counter.frame_count)
    # The first call may start over: it makes symbols of floats, and finds that they are constants.
    assert counts[0] <= 2 and set(counts) == {counts[0]}


def test_hotswap_never_recompiles(counter, tmp_path):
    """Other values, another rank and another scaling, at several batch sizes."""
    targets = ["up", "gate", "down"]
    sources = {}
    words = {"first": {"r": 4, "lora_alpha": 6}, "second": {"r": 7, "lora_alpha": 20}}
    for name, one in words.items():
        torch.manual_seed(1)
        sources[name] = randomize(peft_model(Net(), {"a": one}, targets), seed=len(name))
        sources[name].save_pretrained(tmp_path / name)
    torch.manual_seed(1)
    model = peft_model(Net(), {"a": words["first"]}, targets)
    prepare_model_for_compiled_hotswap(lora_ext.accelerate(model), target_rank=8)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compiled(make_ids())
    compiled(make_ids(5))
    counts = [counter.frame_count]
    for name in ("first", "second", "first"):
        hotswap_adapter(model, str(tmp_path / name / "a"), "a")
        for rows in (6, 11):
            y = compiled(make_ids(rows))
            torch.testing.assert_close(y, sources[name](make_ids(rows)), rtol=1e-4, atol=1e-4)
            counts.append(counter.frame_count)
    assert counts[0] <= 2 and set(counts) == {counts[0]}


def test_a_tensor_scaling_is_an_input_of_the_graph(counter):
    model = lora_ext.accelerate(layer_model("linear", "three", F64))
    (layer,) = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for name in layer.scaling:
        layer.scaling[name] = torch.tensor(layer.scaling[name], dtype=F64)
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), make_x("linear", F64)
    counts = []
    for value in (1.0, 2.0, -3.0):
        layer.scaling["b"].fill_(value)
        assert_close(compiled_step(model, compiled, x), step(model, x), 1e-11)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3  # one more at the second call would be a recompile


def test_switching_compiles_once_for_each_choice(counter):
    model = lora_ext.accelerate(layer_model("linear", "three", F64))
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), make_x("linear", F64)
    counts = []
    for names in (["a"], ["b"], ["a"], ["a", "b"], ["b"]):
        model.base_model.set_adapter(names)
        assert_close(compiled_step(model, compiled, x), step(model, x), 1e-11)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 3, 3]


def test_accelerating_what_was_compiled(counter):
    """The class is guarded: a compiled model takes the other forward at its next call."""
    model, x = layer_model("linear", "one", F64), make_x("linear", F64)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    wanted = compiled(x)
    for change, count in (
        (lora_ext.accelerate, 2),
        (lora_ext.decelerate, 2),
        (lora_ext.accelerate, 2),
    ):
        change(compiled)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-11, atol=1e-11)
        assert counter.frame_count == count
    graphs = [str(graph.code) for graph in counter.graphs]
    assert ["lora_linear" in code for code in graphs] == [False, True]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
def test_export(tmp_path, adapters, strict):
    model = lora_ext.accelerate(net(adapters, F64)).eval()
    ids = make_ids()
    batch = torch.export.Dim("batch", min=2, max=64)
    inner = model.base_model.model  # whose arguments have names
    program = torch.export.export(inner, (ids,), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("lora_ext.lora_linear.default" in targets) == (adapters != "dora")
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (6, 17):
        torch.testing.assert_close(loaded(make_ids(rows)), model(make_ids(rows)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize(("kind", "adapters"), CASES)
def test_no_read_of_the_device(kind, adapters, dtype, dropout):
    """A step on tensors without values: what asked for one, a host sync on a GPU, would raise.

    So a step can be captured in a CUDA graph.
    """
    model = accelerated(layer_model(kind, adapters, dtype, lora_dropout=dropout))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = make_x(kind, dtype)
        y = model(x)
        y.sum().backward()
    assert y.shape == (60, HEIGHT)
