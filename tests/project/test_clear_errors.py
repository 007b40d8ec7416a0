"""What a first day's mistakes are answered with: who speaks, what was expected, what came."""

import importlib
import re

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoRALinear, apply_lora, lora_linear

info_module = importlib.import_module("lora_ext.build_info")


def operands() -> dict:
    return {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
    }


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("value", [None, 3.0, "x"])
def test_an_operand_that_is_no_tensor(name, value):
    with pytest.raises(TypeError, match=rf"lora_linear: expected {name} to be a tensor, but got"):
        lora_linear(**{**operands(), name: value})


@pytest.mark.parametrize("scaling", [None, "0.1", [2.0]])
def test_a_scaling_that_is_no_number(scaling):
    with pytest.raises(TypeError, match=re.escape(f"a number scaling, but got {scaling!r}")):
        lora_linear(**operands(), scaling=scaling)


@pytest.mark.parametrize("scaling", [float("inf"), float("nan"), 1e300, -1e300])
def test_a_scaling_that_is_not_finite(scaling):
    with pytest.raises(RuntimeError, match=r"expected a finite scaling of at most") as caught:
        lora_linear(**operands(), scaling=scaling)
    assert "schema" not in str(caught.value)


def test_a_nested_x():
    parts = [torch.randn(2, 8), torch.randn(3, 8)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(TypeError, match=r"expected a dense x, but got a nested one; pass x.values"):
        lora_linear(**{**operands(), "x": x})
    lora_linear(**{**operands(), "x": x.values()})


def test_a_sparse_x():
    given = operands()
    for call in (LoRALinear(8, 6, r=2), lambda x: lora_linear(**{**given, "x": x})):
        for x in (torch.eye(8).to_sparse(), torch.eye(8).to_sparse_csr()):
            with pytest.raises(TypeError, match=r"dense x, but got one of layout .*x.to_dense\(\)"):
                call(x)


@pytest.mark.parametrize("thing", [None, 3, "model"])
def test_explain_of_what_is_no_model(thing):
    with pytest.raises(TypeError, match=f"explain: expected a model .*{type(thing).__name__}"):
        lora_ext.explain(thing)


def test_explain_of_a_tensor_alone():
    with pytest.raises(TypeError, match=r"explain: expected x, weight, lora_a and lora_b"):
        lora_ext.explain(torch.randn(3, 8))


def test_a_table_that_was_resized_after_the_adapter_was_added():
    """As transformers' resize_token_embeddings does it."""
    model = apply_lora(nn.Sequential(nn.Embedding(10, 4)), LoraConfig("0", r=2))
    model[0].weight.data = torch.randn(12, 4)
    with pytest.raises(RuntimeError, match=r"a table of 10 rows.*it has 12; resize it .* before"):
        model(torch.tensor([1]))


@pytest.mark.parametrize("function", [lora_ext.accelerate, lora_ext.decelerate])
def test_an_older_peft(function, monkeypatch):
    import peft

    for version in ("0.9.0", "0.18.1"):
        monkeypatch.setattr(peft, "__version__", version)
        with pytest.raises(ImportError, match=f"peft 0.19 or newer, but got {version}; pip"):
            function(nn.Sequential(nn.Linear(4, 4)))
    for version in ("0.19.0", "0.22.1.dev0", "1.0"):
        monkeypatch.setattr(peft, "__version__", version)
        lora_ext.decelerate(nn.Linear(4, 4))


def test_the_source_tree_hides_an_installed_copy(tmp_path, monkeypatch):
    for where, files in (("tree", []), ("site", ["_build.json"])):
        (tmp_path / where / "lora_ext").mkdir(parents=True)
        for name in files:
            (tmp_path / where / "lora_ext" / name).write_text("{}")
    monkeypatch.setattr(info_module, "_FACTS_FILE", tmp_path / "tree" / "lora_ext" / "_build.json")
    monkeypatch.setattr("sys.path", [str(tmp_path / "tree"), str(tmp_path / "site")])
    hint = info_module.import_error_hint()
    assert re.search(
        r"tree/lora_ext is the source tree, and hides the installed copy, .*site", hint
    )
    assert "start Python in another folder" in hint
    monkeypatch.setattr("sys.path", [str(tmp_path / "tree")])
    assert "was not built: run `pip install .`" in info_module.import_error_hint()


def test_fx_traces_a_layer_as_one_node():
    """As it does nn.Linear."""
    model = nn.Sequential(nn.Linear(4, 8), LoRALinear(8, 6, r=2), nn.ReLU())
    nn.init.normal_(model[1].lora_b["default"])
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "0",
        "1",
        "2",
    ]
    x = torch.randn(3, 4)
    assert torch.equal(traced(x), model(x))
    with model[1].disable_adapter():
        assert torch.equal(traced(x), model(x))
    torch.fx.symbolic_trace(apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig("0"))).eval()
