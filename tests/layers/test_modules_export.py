"""Layers through torch.export, saved and loaded."""

import pytest
import torch
from step_helpers import IN, UNTRAINED, make

pytestmark = pytest.mark.usefixtures("forget_graphs")


@pytest.mark.parametrize(
    "name",
    ["linear", "lora_bias", "pissa", "several", "projections", "merged lora_bias", "none active"],
)
def test_export(tmp_path, name):
    """Any number of rows, saved and loaded; without dropout, as in eval."""
    layer, x = make(name, 0.4)
    layer.eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    is_base = name in UNTRAINED
    assert targets.count("lora_ext.lora.default") == (0 if is_base else 1)
    assert not any("rand" in target or "dropout" in target for target in targets)
    assert {"weight", "lora_a.default"} <= set(program.state_dict)
    torch.export.save(program, tmp_path / "layer.pt2")
    for exported in (program, torch.export.load(tmp_path / "layer.pt2")):
        for y in (x, torch.randn(7, IN)):
            assert torch.equal(exported.module()(y), layer(y))


@pytest.mark.parametrize("name", ["convolution", "embedding", "block"])
def test_export_of_other_layers(name):
    module, x = make(name, 0.4)
    module.eval()
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), module(x))


def test_export_in_training_draws_a_seed():
    layer, x = make("linear", 0.4)
    exported = torch.export.export(layer, (x,)).module()
    results = []
    for function in (exported, layer):
        torch.manual_seed(5)
        results.append(function(x))
    assert torch.equal(*results)
    assert not torch.equal(exported(x), exported(x))
