"""Our layers in random states: the path that `path` names is the one that their ops show."""

import torch
from helpers import BF16, F32, F64, Ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_ext
from lora_ext.nn import AdapterSpec, LoRAConv2d, LoRAEmbedding, LoRALinear

# Products and lookups of torch, of which the base alone has one.
PRODUCTS = {"mm", "addmm", "bmm", "embedding", "convolution"}
KINDS = {
    "linear": lambda dtype: LoRALinear(8, 12, r=0, dtype=dtype),
    "conv1d": lambda dtype: LoRALinear(8, 12, r=0, dtype=dtype, fan_in_fan_out=True),
    "conv": lambda dtype: LoRAConv2d(8, 12, 1, dtype=dtype),
    "embedding": lambda dtype: LoRAEmbedding(8, 12, r=0, dtype=dtype),
}
STATES = {
    "kind": sorted(KINDS),
    "dtype": [F32, BF16, F64],
    "adapter_dtype": [None, BF16, F32],
    "other": [AdapterSpec(3, 3.0), AdapterSpec(3, 3.0, 0.3), AdapterSpec(300, 3.0), None],
    "lora_bias": [False, True],
    "active": [["a"], ["a", "b"], []],
    "verb": ["none", "merged", "disabled"],
    "rows": [None, None, ["a", None, "b"], [None] * 3],
    "autocast": [False, True],
    "grad": [False, True],
}


def made(state):
    layer = KINDS[state["kind"]](state["dtype"])
    bias = state["lora_bias"] and state["kind"] != "embedding"
    other = state["other"] or AdapterSpec(300, 3.0, lora_bias=bias)
    for name, spec in {"a": AdapterSpec(300, 6.0, lora_bias=bias), "b": other}.items():
        layer.add_adapter(name, spec, None if state["dtype"] is F64 else state["adapter_dtype"])
    layer.set_adapter(state["active"])
    if state["verb"] == "merged" and state["rows"] is None:
        layer.merge()
    return nn.Sequential(layer)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({key: st.sampled_from(each) for key, each in STATES.items()}))
def test_the_path_that_is_named_is_the_one_that_runs(state):
    model = made(state)
    kind, layer = state["kind"], model[0]
    shape = {"conv": (3, 8, 2, 2), "embedding": (3, 4)}.get(kind, (3, 4, 8))
    x = torch.zeros(shape, dtype=torch.int64 if kind == "embedding" else state["dtype"])
    with (
        torch.set_grad_enabled(state["grad"]),
        torch.autocast("cpu", BF16, state["autocast"] and state["dtype"] is not F64),
    ):
        if state["rows"] is None and state["verb"] == "disabled":
            layer._disabled.append(None)
        with lora_ext.use_adapters(model, state["rows"] or [None] * 3):
            if state["rows"] is not None:
                check(layer, model, x)
        if state["rows"] is None:
            check(layer, model, x)


def check(layer, model, x):
    """One forward has the ops of the path that the layer names."""
    path, reason = layer.path()
    with Ops() as ops:
        model(x)
    product = sum(func._opname in PRODUCTS for func, _ in ops.seen)
    own = sum(func.namespace == "lora_ext" for func, _ in ops.seen)
    if path in ("base", "merged"):
        assert (product, own) == (1, 0), (path, reason)
    elif isinstance(layer, LoRAEmbedding):
        assert product > 1 and own == ("each row" in reason), (path, reason)
    elif "by torch" in reason:
        assert product > 1 and not own, (path, reason)
    elif path == "added":
        assert product and own, (path, reason)
    else:
        assert own and not product, (path, reason)
