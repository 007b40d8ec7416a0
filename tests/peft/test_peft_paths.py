"""PEFT's layers in random states: the path that `explain` names is the one that their ops show."""

from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from helpers import BF16, F32, F64, Ops
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import layer as peft_layers
from peft_helpers import ADAPTERS, HEIGHT, KINDS, WIDTH, accelerated, make_base, make_x, peft_model
from torch import nn

import lora_ext

# Products and lookups of torch, of which the base alone has one.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "embedding"}


class Called(nn.Linear):
    """Not exactly nn.Linear: the base has to be called."""


class Router(nn.Module):
    """A module with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEIGHT, WIDTH))

    def forward(self, x):
        return F.linear(x, self.weight)


CHANGES = {
    "a hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "a hook on A": lambda layer: layer.lora_A["a"].register_forward_hook(lambda *_: None),
    "a trained base": lambda layer: [p.requires_grad_() for p in layer.base_layer.parameters()],
    "another forward of the base": lambda layer: setattr(
        layer.base_layer, "forward", lambda x: type(layer.base_layer).forward(layer.base_layer, x)
    ),
    "another dtype of A": lambda layer: layer.lora_A["a"].to(BF16),
    "no cast of x": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "a scaling in a tensor": lambda layer: layer.scaling.update(a=torch.tensor(2.0)),
}
VERBS = {
    "none": lambda layer: None,
    "merged": lambda layer: layer.merge(),
    "disabled": lambda layer: layer.enable_adapters(False),
    "none active": lambda layer: setattr(layer, "_active_adapter", "other"),
}


@st.composite
def states(draw):
    kind = draw(st.sampled_from([*KINDS, "called", "router"]))
    plain = ["one", "three"]
    adapters = draw(st.sampled_from(plain if kind in ("called", "router") else list(ADAPTERS)))
    if kind == "embedding" and adapters == "lora_bias":
        adapters = "one"  # PEFT has none
    dtype = draw(st.sampled_from([F32, BF16, F64]))
    names = sorted(ADAPTERS[adapters])
    return {
        "kind": kind,
        "adapters": adapters,
        "dtype": dtype,
        "half_adapters": draw(st.booleans()),
        "dropout": 0.0 if kind == "router" else draw(st.sampled_from([0.0, 0.3])),
        "active": draw(st.sampled_from([names[:1], names, names[::-1]])),
        "verb": draw(st.sampled_from(["none", *VERBS])),
        "changes": draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=2, unique=True)),
        "training": draw(st.booleans()),
        "rows": draw(st.sampled_from([None, ["a", None, "a"], [names[-1], "a", None], [None] * 3])),
        "autocast": draw(st.booleans()),
        "grad": draw(st.booleans()),
    }


def made(state):
    torch.manual_seed(1)
    kind, given = state["kind"], state["adapters"]
    other = {"called": lambda: Called(WIDTH, HEIGHT), "router": Router}
    base = nn.Sequential(other[kind]() if kind in other else make_base(kind))
    words = {"lora_dropout": state["dropout"]}
    targets = ["0"]
    if kind == "router":
        words, targets = {"target_parameters": ["0.weight"]}, []
    half = state["half_adapters"]
    model = peft_model(base, ADAPTERS[given], targets, state["dtype"], half, **words)
    model = accelerated(model).train(state["training"])
    model.base_model.set_adapter(state["active"])
    layer = model.base_model.model[0]
    VERBS[state["verb"]](layer)
    for change in state["changes"]:
        if len(layer.lora_A) or not change.endswith(" A"):
            CHANGES[change](layer)
    return model


def shown(model, x):
    """The path that the ops of a forward show."""
    calls = []
    with ExitStack() as stack:
        for kind in (peft_layers.Linear, peft_layers.Embedding, peft_layers.ParamWrapper):

            def noted(layer, *args, real=kind.forward, **kwargs):
                calls.append(layer)
                return real(layer, *args, **kwargs)

            stack.enter_context(mock.patch.object(kind, "forward", noted))
        ops = stack.enter_context(Ops())
        try:
            model(x)
        except (RuntimeError, ValueError):  # PEFT's, or that rows cannot have adapters
            return "peft"
    seen = [func._opname for func, _ in ops.seen if func.namespace == "aten"]
    own = {func._opname for func, _ in ops.seen if func.namespace == "lora_ext"}
    products = sum(name in PRODUCTS for name in seen)
    if own - {"dropout_mask"} and not products:
        return "fused"
    if products == 1 and not own:
        return "base"
    return "peft" if calls else "added"


PLAIN = {
    "kind": "linear",
    "adapters": "one",
    "dtype": F32,
    "half_adapters": False,
    "dropout": 0.0,
    "active": ["a"],
    "verb": "none",
    "changes": [],
    "training": True,
    "rows": None,
    "autocast": False,
    "grad": True,
}
ROWS = {"rows": ["a", None, "a"]}


@example({**PLAIN, **ROWS, "changes": ["a trained base"]})
@example({**PLAIN, **ROWS, "adapters": "lora_bias"})
@example({**PLAIN, "dtype": F64, "autocast": True})
@example({**PLAIN, "changes": ["no cast of x"], "dtype": BF16})
@settings(max_examples=200, deadline=None, derandomize=True)
@given(states())
def test_the_path_that_is_named_is_the_one_that_runs(state):
    model = made(state)
    x = make_x("embedding" if state["kind"] == "embedding" else "linear", state["dtype"], 12)
    x = x.view(3, 4, *x.shape[1:])
    block = nullcontext()
    if state["rows"] is not None:
        block = lora_ext.use_adapters(model, state["rows"])
    with (
        block,
        torch.set_grad_enabled(state["grad"]),
        torch.autocast("cpu", BF16, state["autocast"]),
    ):
        (named,) = lora_ext.explain(model)
        path = {"packed": "fused", "library": "fused"}.get(named.path, named.path)
        assert shown(model, x) == path, named
