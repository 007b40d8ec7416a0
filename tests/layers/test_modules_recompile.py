"""How often torch.compile compiles a layer of ours again.

The tests hold it to these numbers, and `contract/test_recompile` to those that PEFT's layers share:

    set_adapter                     once for each choice of names, in their order; never again for
                                    a choice that was seen
    requires_grad, no_grad          once for each state that was not seen
    merge, unmerge, eval, train     once for each state; merging again, never
    equal layers compiled apart     once for all of them
"""

import copy
from contextlib import ExitStack

import pytest
import torch
from layer_helpers import randomize
from step_helpers import ROWS, Pair, assert_same, make, run, several
from torch import nn

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.nn import AdapterSpec

pytestmark = pytest.mark.usefixtures("forget_graphs")


def do(action, layer, disabling):
    if isinstance(action, list):
        layer.set_adapter(action)
    elif action == "add and delete":
        layer.add_adapter("fourth", AdapterSpec(2, 3))
        layer.delete_adapter("fourth")
    elif action == "merge second":
        layer.merge("second")
    elif action == "disable":
        disabling.enter_context(layer.disable_adapter())
    elif action == "enable":
        disabling.close()
    else:
        getattr(layer, action)()


# (what is done to the layer, graphs after the next call)
SWITCHES = [
    (["default"], 1),
    (["second"], 2),
    ([], 3),
    (["default"], 3),
    ("disable", 4),
    ("enable", 4),
    ("add and delete", 4),
    ("eval", 5),
    ("merge", 6),
    ("unmerge", 6),
    ("merge", 6),
    ("train", 6),
    ("eval", 6),
    (["default", "second"], 7),
    ("merge second", 8),
    ("unmerge", 8),
    ("merge second", 8),
    ("merge", 9),
    ("train", 10),
]


def test_switching_adapters_compiles_once_for_each_state(counter):
    layer = several(0.4, dropouts=(0.0, 0.6))
    x = torch.randn(ROWS)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    results = []
    with torch._dynamo.config.patch(recompile_limit=32), ExitStack() as disabling:
        for action, _ in SWITCHES:
            do(action, layer, disabling)
            assert_same(run(compiled, layer, x), run(layer, layer, x))
            results.append((action, counter.frame_count))
    assert results == SWITCHES


def test_equal_blocks_share_a_graph(counter):
    """Compiling block by block: what the first one compiles serves the others."""
    model = nn.Sequential(*(Pair() for _ in range(6)))
    apply_lora(model, LoraConfig("all-linear", r=2, lora_dropout=0.4))
    randomize(model)
    eager = copy.deepcopy(model)
    for module in model:
        module.compile(backend=counter, fullgraph=True)
    x = torch.randn(ROWS)
    assert_same(run(model, model, x), run(eager, eager, x))
    assert counter.frame_count == 1
    for one in (model, eager):
        apply_lora(one, LoraConfig("all-linear", r=4), "second")
        lora_ext.set_adapter(one, "second")
        torch.manual_seed(1)
        randomize(one)
    assert_same(run(model, model, x), run(eager, eager, x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["linear", "several, other dropout", "lora_bias"])
def test_where_requires_grad_differs(counter, name):
    layer, x = make(name, 0.4)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    states = [
        ("lora_a", "lora_b"),
        ("x", "lora_a", "lora_b"),
        ("x", "lora_b"),
        ("x", "lora_a", "bias"),
        ("x",),
        ("bias",),
        (),
    ]
    for _ in range(2):  # the second time every graph is there
        for wanted in states:
            for key, parameter in layer.named_parameters():
                parameter.requires_grad_(key.split(".")[0] in wanted)
            eager = run(layer, layer, x, "x" in wanted)
            assert (eager["bias"] is not None) == ("bias" in wanted)
            assert_same(run(compiled, layer, x, "x" in wanted), eager)
    assert counter.frame_count == len(states)
