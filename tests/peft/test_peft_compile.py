"""Accelerated models under torch.compile where PEFT's own parts take part, and torch.export.

`contract/test_compile` and `test_recompile` have what our own layers do, too. How often
torch.compile compiles beyond that:

    hotswap_adapter                 never, after prepare_model_for_compiled_hotswap: other values,
                                    other ranks up to the target, other scalings
    a scaling in a tensor           never, whatever it holds
    accelerate, decelerate          once for each
"""

import pytest
import torch
from helpers import F64
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_helpers import Net, layer_model, make_ids, make_x, net, peft_model, randomize, step
from torch import nn

import lora_ext

pytestmark = pytest.mark.usefixtures("forget_graphs")


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


def test_one_graph_around_a_base_whose_hook_changes_y(counter):
    model = lora_ext.accelerate(layer_model("linear", "three", F64, lora_dropout=0.3))
    model.base_model.model[0].base_layer.register_forward_hook(lambda m, i, y: 2 * y)
    x = make_x("linear", F64)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled_step(model, compiled, x), step(model, x), 1e-11)
    assert counter.frame_count == 1


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
    assert ["ops.lora_ext.lora" in code for code in graphs] == [False, True]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
def test_export(tmp_path, adapters, strict):
    model = lora_ext.accelerate(net(adapters, F64)).eval()
    ids = make_ids()
    batch = torch.export.Dim("batch", min=2, max=64)
    inner = model.base_model.model  # whose arguments have names
    program = torch.export.export(inner, (ids,), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("lora_ext.lora.default" in targets) == (adapters != "dora")
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (6, 17):
        torch.testing.assert_close(loaded(make_ids(rows)), model(make_ids(rows)))
